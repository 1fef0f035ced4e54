"""A hook of MkDocs: the files in the repository's root become pages, with their links adapted."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each of PAGES."""
    root = Path(config.config_file_path).parent
    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=adapted((root / name).read_text())))
    return files


def on_page_markdown(markdown: str, page: object, **_: object) -> str:
    """Links from pages in docs/ to files in the root lead to their pages too."""
    return adapted(markdown)


def adapted(markdown: str) -> str:
    """Links to `docs/<page>` and to the root's files as links between pages."""
    for name, page in PAGES.items():
        markdown = markdown.replace(f"](../{name}", f"]({page}").replace(f"]({name}", f"]({page}")
    return markdown.replace("](docs/", "](")
