"""What mkdocs does not do by itself: what lies outside of docs/, formulas, and a summary.

On a forge that renders Markdown, the pages may be read as they are, so they link to
`../assets/...` and `../examples/...`. Here figures become part of the site, tables of
benchmarks/ and studies/ appear where a line links to them, and other files are linked in the
repository, whose address is `project.urls.Repository` of pyproject.toml. A line that consists
of a link to an example becomes a box with the functions to copy. README is the front page.
Formulas become MathML, which browsers show without a script.
"""

import html
import json
import pathlib
import re
import tomllib

import latex2mathml.converter
from mkdocs.structure.files import File


ROOT = pathlib.Path(__file__).parent.parent


def on_config(config):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    urls = project.get("urls", {})
    config.repo_url = urls.get("Repository", "").rstrip("/")
    config.repo_name = "/".join(config.repo_url.split("/")[-2:])
    config.site_url = urls.get("Documentation", "")
    return config


def on_files(files, config):
    for path in sorted((ROOT / "assets").iterdir()):
        name = f"assets/{path.name}"
        files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    front_page = re.sub(r"\]\((?!https?:|#|docs/)", "](../", (ROOT / "README.md").read_text())
    front_page = front_page.replace("](docs/", "](")
    front_page = f"---\ndescription: {config.site_description}\n---\n\n{front_page}"
    files.append(File.generated(config, "index.md", content=front_page))
    return files


def read_notebook(page):
    return json.loads(pathlib.Path(page.file.abs_src_path).read_text())


def on_page_markdown(markdown, page, config, files):
    if page.file.src_uri.endswith(".ipynb"):
        page.meta["description"] = read_notebook(page)["metadata"]["description"]

    def table(match):
        lines = (ROOT / match[1]).read_text().splitlines()[1:]  # without the title
        # Blank lines stay: they separate tables.
        rows = [line for line in lines if not line or line.startswith("|")]
        return "\n".join(rows if any(rows) else lines)  # without rows, what the text says

    def link(match):
        text, path = match.groups()
        if path.startswith("assets/"):
            return f"[{text}]({path})"
        if not (ROOT / path).exists():
            raise FileNotFoundError(f"docs/{page.file.src_uri} links to ../{path}")
        # Without an address there is nothing to link to.
        return f"[{text}]({config.repo_url}/blob/main/{path})" if config.repo_url else text

    def functions_to_copy(match):
        _, code = (ROOT / match[2]).read_text().split('"""\n\n', maxsplit=1)
        code = code.split("\n\n\n#\n# ")[0]  # up to the comment where the program begins
        lines = ["```python", *code.splitlines(), "```"]
        return f'??? note "{match[1]}"\n' + "".join(f"    {line}\n" for line in lines)

    markdown = re.sub(
        r"^\[([^\[\]]*)\]\(\.\./(examples/\w+\.py)\)$",
        functions_to_copy,
        markdown,
        flags=re.MULTILINE,
    )
    markdown = re.sub(
        r"^\[[^\[\]]*\]\(\.\./((?:benchmarks|studies)/\w+/\w+\.md)\)$",
        table,
        markdown,
        flags=re.MULTILINE,
    )
    return re.sub(r"\[([^\[\]]*)\]\(\.\./([^)#]+)\)", link, markdown)


def on_page_content(content, page, config, files):
    def mathml(match):
        formula, display = html.unescape(match[3]), "block" if match[1] == "div" else "inline"
        converted = latex2mathml.converter.convert(formula, display=display)
        return f'<div class="formula">{converted}</div>' if display == "block" else converted

    if page.file.src_uri.endswith(".ipynb"):  # nbconvert ignores what its cells say of figures
        for cell in read_notebook(page)["cells"]:
            if alt := cell["metadata"].get("alt"):
                no_alt = "No description has been provided for this image"
                content = content.replace(no_alt, html.escape(alt), 1)
    pattern = r'<(div|span) class="arithmatex">\\(\[|\()(.*?)\\[\])]</\1>'
    return re.sub(pattern, mathml, content, flags=re.DOTALL)


def on_post_build(config):
    """Writes llms.txt, a summary of the pages, from their descriptions."""
    lines = ["# residuum", "", f"> {config.site_description}", ""]
    pages = [item for item in config.nav_pages if item.meta.get("description")]
    lines += [
        f"- [{page.title}]({page.url or '.'}): {page.meta['description']}" for page in pages
    ]
    (pathlib.Path(config.site_dir) / "llms.txt").write_text("\n".join(lines) + "\n")


def on_nav(nav, config, files):
    config.nav_pages = nav.pages
    return nav
