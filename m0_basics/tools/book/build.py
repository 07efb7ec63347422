"""Build the site: English at the top, Chinese in zh/. It opens from the disk, without a server or the network."""
from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from m0_basics.config import ConfigError, require

from .pages import ACROSS, ROOT, TITLES, Site

OUTPUT = ROOT / "build" / "book"
_NAMES = {"en": "LLM inference lab", "zh-CN": "LLM 推理引擎实验室"}
_THEME_LANGUAGE = {"en": "en", "zh-CN": "zh"}
# Where the search cuts words: as the theme does it, and at signs; and each Chinese character from its neighbours.
_CUT = {"en": r"[\s\-,.;:!?()`\"/]+", "zh-CN": r"[\s\u200b\u3000\-,.;:!?()`\"/、。，．？！；：（）“”《》]+"
        r"|(?<=[\u4e00-\u9fff])(?=[\w\u4e00-\u9fff])|(?<=\w)(?=[\u4e00-\u9fff])"}
_LANGUAGES = {"en": "English", "zh-CN": "中文"}
FOLDER = {"en": "", "zh-CN": "zh"}


def build(output: Path = OUTPUT, root: Path = ROOT) -> Path:
    """Write the whole site; return its first page. Raises ConfigError for links that lead nowhere."""
    for module in ("mkdocs", "material"):
        require(module, "the book", extra="book")
    shutil.rmtree(output, ignore_errors=True)
    sources = output.parent / f"{output.name}-source"
    sites = [Site(lang, sources / (FOLDER[lang] or "en"), root) for lang in TITLES]
    for site in sites:
        site.write()
    for site in sites:
        _generate(site, output / FOLDER[site.lang], sites)
    shutil.rmtree(sources)
    problems = [problem for site in sites for problem in site.problems]
    if problems:
        raise ConfigError("links of the book lead nowhere:\n" + "\n".join(problems))
    return output / "index.html"


def _generate(site: Site, target: Path, sites: list[Site]) -> None:
    for asset in ("book.css", "iframe-worker.js"):
        shutil.copyfile(Path(__file__).with_name(asset), site.docs / asset)
    from mkdocs.commands.build import build as run
    from mkdocs.config import load_config
    logging.getLogger("mkdocs").setLevel(logging.WARNING)
    config = load_config(config_file=str(_config_file(site, target, sites)))
    run(config)
    # It is for a server that has the book at its top: elsewhere nothing in it is found.
    (target / "404.html").unlink(missing_ok=True)


def _config_file(site: Site, target: Path, sites: list[Site]) -> Path:
    file = site.docs.parent / f"{site.docs.name}.yml"
    text = json.dumps(settings(site, target, sites), ensure_ascii=False, indent=1)      # JSON is YAML
    file.write_text(text, encoding="utf-8")
    return file


def settings(site: Site, target: Path, sites: list[Site]) -> dict[str, Any]:
    """The generator's configuration."""
    light = {"media": "(prefers-color-scheme: light)", "scheme": "default", "primary": "white", "accent": "indigo",
             "toggle": {"icon": "material/weather-night", "name": "dark"}}
    dark = {"media": "(prefers-color-scheme: dark)", "scheme": "slate", "primary": "black", "accent": "indigo",
            "toggle": {"icon": "material/weather-sunny", "name": "light"}}
    theme = {"name": "material", "language": _THEME_LANGUAGE[site.lang], "font": False, "palette": [light, dark],
             "features": ["navigation.footer", "navigation.indexes", "navigation.top", "toc.follow", "search.highlight",
                          "search.suggest", "content.code.copy", "navigation.tracking"]}
    languages = [{"name": _LANGUAGES[other.lang], "lang": _THEME_LANGUAGE[other.lang], "link": f"language:{other.lang}",
                  "root": "" if other is site else ACROSS[site.lang],
                  "pages": [page.place for page in other.by_source.values()]} for other in sites]
    # No stemmer: the theme asks for words that begin as the query does, and does not find "prefill" behind its stem.
    search = {"search": {"separator": _CUT[site.lang], "pipeline": []}}
    return {"site_name": _NAMES[site.lang], "docs_dir": str(site.docs), "site_dir": str(target), "theme": theme,
            "use_directory_urls": False, "nav": site.nav(), "extra_css": ["book.css"],
            "hooks": [str(Path(__file__).with_name("hook.py"))], "plugins": [search, "offline"],
            "extra": {"alternate": languages, "generator": False, "polyfills": ["iframe-worker.js"]},
            "copyright": "Apache-2.0", "validation": {"nav": {"omitted_files": "ignore"}}}
