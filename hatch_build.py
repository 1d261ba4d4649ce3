"""The readme of the distributions: README.md with absolute links, so that they work on PyPI.

The address of the repository is one setting, `project.urls.Repository` in pyproject.toml.
"""

import pathlib
import re

from hatchling.metadata.plugin.interface import MetadataHookInterface


def absolute(readme, repository):
    """Links of Markdown to files of the repository: figures as they are, all else as pages."""
    readme = re.sub(r"\]\((assets/)", rf"]({repository}/raw/main/\1", readme)
    return re.sub(r"\]\((?!https?:|#)", f"]({repository}/blob/main/", readme)


class CustomMetadataHook(MetadataHookInterface):
    def update(self, metadata):
        readme = pathlib.Path(self.root, "README.md").read_text()
        text = absolute(readme, metadata["urls"]["Repository"].rstrip("/"))
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
