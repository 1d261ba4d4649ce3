"""What mkdocs does not do by itself: figures and links that lie outside of docs/.

On a forge that renders Markdown, the pages may be read as they are, so they link to
`../assets/...` and `../examples/...`. Here the figures become part of the site, and all other
files of the repository are linked where `project.urls.Repository` of pyproject.toml says.
"""

import pathlib
import re
import tomllib

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
    return files


def on_page_markdown(markdown, page, config, files):
    def link(match):
        text, path = match.groups()
        if path.startswith("assets/"):
            return f"[{text}]({path})"
        if not (ROOT / path).exists():
            raise FileNotFoundError(f"docs/{page.file.src_uri} links to ../{path}")
        # Without an address there is nothing to link to.
        return f"[{text}]({config.repo_url}/blob/main/{path})" if config.repo_url else text

    return re.sub(r"\[([^\[\]]*)\]\(\.\./([^)#]+)\)", link, markdown)
