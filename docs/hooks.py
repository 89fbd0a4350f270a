"""Hooks of mkdocs: pages that are generated from the source, and links that leave docs/.

Generated are the config reference, a page of the API reference for each package, CONTRIBUTING.md, and a page with the
text of each source file that a guide links to. So the guides can link to files of the repository, as they do on GitHub,
and the site needs no other server.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from gptjax.config import reference

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\]\(((?:\.\./)+)([^)#]+)(#[^)]*)?\)")
CODE = re.compile(r"`[^`\n]+`")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".sbatch": "bash"}
# Files outside docs/ that have a page of their own.
PAGES = {"README.md": "index.md", "README.zh-CN.md": "index.md", "CONTRIBUTING.md": "contributing.md"}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Puts the pages of the API reference into the navigation."""
    (reference_section,) = (entry["Reference"] for entry in config.nav or [] if "Reference" in entry)
    reference_section[-1]["API"] = [f"api/{name}.md" for name in api_pages()]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    pages = {"config.md": reference.markdown(), "contributing.md": (ROOT / "CONTRIBUTING.md").read_text()}
    pages |= {f"api/{name}.md": text for name, text in api_pages().items()}
    for file in files.documentation_pages():
        for path in linked_sources(file.src_uri, file.content_string):
            pages[source_page(path)] = source_text(path)
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def api_pages() -> dict[str, str]:
    """Package -> a page with all its modules; the modules outside of packages are the commands."""
    modules: dict[str, list[str]] = {}
    for path in sorted((ROOT / "gptjax").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[-1] != "__init__" or parts == ("gptjax", "__init__"):
            name = parts[1] if len(parts) > 2 else "gptjax"
            modules.setdefault(name, []).append(".".join(parts).removesuffix(".__init__"))
    return {
        name: "\n".join([f"# {name}", "", *(f"::: {module}\n" for module in found)]) for name, found in modules.items()
    }


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replaces links to files outside docs/ by links to their pages of the site, and `\\|` in code by `|`.

    GitHub needs the backslash in tables; Python-Markdown would show it.
    """
    up = "../" * page.file.src_uri.count("/")

    def replaced(match: re.Match[str]) -> str:
        path = outside(page.file.src_uri, match[1] + match[2])
        if path is None:
            return match[0]
        return f"]({up}{PAGES.get(path) or source_page(path)})"

    return CODE.sub(lambda code: code[0].replace("\\|", "|"), LINK.sub(replaced, markdown))


def linked_sources(page: str, markdown: str) -> list[str]:
    """Paths, from the root of the repository, of the files outside docs/ that a page links to."""
    paths = [outside(page, match[1] + match[2]) for match in LINK.finditer(markdown)]
    return [path for path in paths if path is not None and path not in PAGES]


def outside(page: str, link: str) -> str | None:
    """The path from the root of the repository that a relative link of a page means; None: it stays within docs/."""
    path = (ROOT / "docs" / page).parent.joinpath(link).resolve()
    return None if path.is_relative_to(ROOT / "docs") else path.relative_to(ROOT).as_posix()


def source_page(path: str) -> str:
    return f"source/{path.removesuffix('.md')}.md"


def source_text(path: str) -> str:
    """A page with the text of a file: a Markdown file as it is, any other as code."""
    file = ROOT / path
    if file.suffix == ".md":
        return file.read_text(encoding="utf-8")
    fence = "~~~~~~"
    return f"# {path}\n\n{fence}{LANGUAGES.get(file.suffix, 'text')}\n{file.read_text(encoding='utf-8')}\n{fence}\n"
