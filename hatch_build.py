"""What the distributions hold that is not in the repository as it stands.

The wheel holds residuum.py as a package, together with the `py.typed` that tells type checkers
to look into it. The readme on PyPI is README.md with absolute links. The address of the
repository is one setting, `project.urls.Repository` in pyproject.toml.
"""

import pathlib
import re

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.metadata.plugin.interface import MetadataHookInterface


class CustomBuildHook(BuildHookInterface):
    def initialize(self, version, build_data):
        if self.target_name == "wheel" and version != "editable":
            build_data["force_include"] |= {
                "residuum.py": "residuum/__init__.py",
                "py.typed": "residuum/py.typed",
            }


class CustomMetadataHook(MetadataHookInterface):
    def update(self, metadata):
        readme = pathlib.Path(self.root, "README.md").read_text()
        text = with_absolute_links(readme, metadata["urls"]["Repository"].rstrip("/"))
        metadata["readme"] = {"content-type": "text/markdown", "text": text}


def with_absolute_links(readme, repository):
    """Figures are linked as files, all else as pages of the repository."""
    readme = re.sub(r"\]\((?=assets/)", f"]({repository}/raw/main/", readme)
    return re.sub(r"\]\((?!https?:|#)", f"]({repository}/blob/main/", readme)
