"""The site that `make docs` builds from the pages of this directory, as they are on GitHub."""

from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform

ROOT = Path(__file__).resolve().parents[1]

project = "megatron_dyt"
extensions = ["myst_parser"]
html_theme = "furo"
html_title = project
html_copy_source = False
exclude_patterns = ["conf.py"]
myst_heading_anchors = 4
myst_enable_extensions = []


class FilesOfTheRepository(SphinxPostTransform):
    """Links to files outside this directory, which the site does not hold: their text, and the path."""

    default_priority = 5  # Before MyST looks for the targets.

    def run(self) -> None:
        here = Path(self.env.doc2path(self.env.docname)).parent
        links = [*self.document.findall(addnodes.pending_xref)]
        links += self.document.findall(addnodes.download_reference)
        for link in links:
            target = (here / link.get("reftarget", "").split("#")[0]).resolve()
            if not target.exists():
                target = target.with_name(target.name + ".md")  # MyST takes the ending off.
            if target.exists() and target.is_relative_to(ROOT) and not target.is_relative_to(here):
                path = target.relative_to(ROOT).as_posix()
                shown = [] if path.endswith(link.astext()) else [nodes.Text(" "), nodes.literal(path, path)]
                link.replace_self([*link.children, *shown])


def setup(app: Sphinx) -> None:
    app.add_post_transform(FilesOfTheRepository)
