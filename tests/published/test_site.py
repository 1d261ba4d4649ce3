"""`mkdocs build` made the site in site/. These tests verify its search, formulas, tables,
figures and cards."""

import html.parser
import json
import pathlib
import re

import pytest


ROOT = pathlib.Path(__file__).parents[2]
SITE = ROOT / "site"
PAGES = [page for page in sorted(SITE.rglob("index.html")) if "assets" not in page.parts]

# Practitioners search for these words.
WORDS = """residual, PINN, unsupervised, TBPTT, truncated backpropagation, replay buffer,
Dirichlet, Neumann, ghost cell, forcing, inputs, batch norm, offload, temporal bundling,
burn-in, overlapping, baseline, conservation, superiority, physics-informed, surrogate,
persistence, gradient clipping, boundary condition, warm-up, ablation, error estimate,
floor of the residual, finite element, FEM, mass matrix, stiffness matrix, unstructured mesh,
triangle, BCOO, hard constraint, Robin, SUPG, stabilisation, convection, time-dependent matrix,
elastodynamics, Newmark, traction, multigrid""".replace("\n", " ").split(", ")


class Elements(html.parser.HTMLParser):
    """Collects the elements of a page, `[(tag, {attribute: value})]`."""

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page.read_text())

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def of(self, tag):
        return [attrs for name, attrs in self.found if name == tag]


@pytest.fixture(scope="module")
def searched():
    index = json.loads((SITE / "search" / "search_index.json").read_text())
    return " ".join(f"{entry['title']} {entry['text']}" for entry in index["docs"]).lower()


@pytest.mark.parametrize("word", WORDS)
def test_search_finds(word, searched):
    assert word.lower() in searched


def test_all_pages_are_built():
    assert len(PAGES) == len(list((ROOT / "docs").glob("*.md"))) + 2  # README and the notebook


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_a_page_has_a_description_and_a_card(page):
    elements = Elements(page)
    named = {attrs.get("name") or attrs.get("property"): attrs for attrs in elements.of("meta")}
    for name in ("description", "og:title", "og:description", "og:image"):
        assert named[name]["content"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_figures_say_what_they_show(page):
    for attrs in Elements(page).of("img"):
        alt = attrs.get("alt", "")
        is_described = len(alt) > 20 and not alt.startswith("No description")
        assert is_described or attrs["src"].endswith("logo.svg"), attrs


@pytest.mark.parametrize(
    "name, formulas",
    [
        ("first_steps", 2),
        ("your_own_problem", 3),
        ("diverted_chain", 8),
        ("recipes_problems", 6),
        ("how_good_is_it", 1),
        ("meshes", 3),
    ],
)
def test_formulas_are_typeset(name, formulas):
    text = (SITE / name / "index.html").read_text()
    assert text.count("<math") >= formulas and "arithmatex" not in text


@pytest.mark.parametrize(
    "name, tables", [("published_emulator", 5), ("cost", 4), ("cuts", 5), ("scaling_out", 4)]
)
def test_tables_of_benchmarks_are_shown(name, tables):
    page = SITE / name / "index.html"
    assert len(Elements(page).of("table")) >= tables
    assert "<td>---" not in page.read_text()  # else two tables have merged


@pytest.mark.parametrize(
    "name, function, program",
    [
        ("how_good_is_it", "estimate_error", "unseen_states"),
        ("recipes_training", "put_back", None),
        ("cost", "canonical_convolutions", None),
    ],
)
def test_functions_to_copy_are_shown_without_their_program(name, function, program):
    text = (SITE / name / "index.html").read_text()
    (box,) = re.findall(r"<details.*?</details>", text, re.DOTALL)
    defined = re.findall(r'<span class="nf">(\w+)</span>', box)
    assert function in defined and program not in defined and "main" not in defined


def test_old_links_to_recipes_land_on_the_line_that_leads_on():
    links = Elements(SITE / "recipes" / "index.html").of("a")
    ids = {attrs["id"]: i for i, attrs in enumerate(links) if "id" in attrs}
    for old, new in (("dropout", "dropout"), ("loss-scaling", "loss-scaling-in-float16")):
        assert links[ids[old] + 1]["href"].endswith(f"/#{new}")


def test_docstrings_have_no_list_by_accident():
    assert "<ol>" not in (SITE / "api" / "index.html").read_text()


def test_the_summary_lists_every_page():
    lines = (SITE / "llms.txt").read_text().splitlines()
    assert len([line for line in lines if line.startswith("- [")]) == len(PAGES)


def test_the_notebook_was_run():
    page = SITE / "tutorial" / "index.html"
    figures = [x for x in Elements(page).of("img") if x["src"].startswith("data:image/png")]
    assert len(figures) == 6


def test_nothing_is_loaded_from_elsewhere():
    for page in PAGES:
        elements = Elements(page)
        links = [attrs.get("href", "") for attrs in elements.of("link")]
        sources = [
            attrs.get("src", "") for tag in ("script", "img") for attrs in elements.of(tag)
        ]
        assert not [x for x in links + sources if x.startswith(("http", "//"))], page
