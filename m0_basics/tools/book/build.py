"""Build the site: English at the top, Chinese in zh/. It opens from the disk, without a server or the network."""
from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from m0_basics.config import ConfigError, require

from .pages import ROOT, TITLES, Site

OUTPUT = ROOT / "build" / "book"
_NAMES = {"en": "LLM inference lab", "zh-CN": "LLM 推理实验室"}
_THEME_LANGUAGE = {"en": "en", "zh-CN": "zh"}
FOLDER = {"en": "", "zh-CN": "zh"}


def build(output: Path = OUTPUT, root: Path = ROOT) -> Path:
    """Write the whole site; return its first page. Raises ConfigError for links that lead nowhere."""
    for module in ("mkdocs", "material"):
        require(module, "the book", extra="book")
    shutil.rmtree(output, ignore_errors=True)
    sources = output.parent / f"{output.name}-source"
    problems = []
    for lang in TITLES:
        site = Site(lang, sources / (FOLDER[lang] or "en"), root)
        site.write()
        problems += site.problems
        _generate(site, output / FOLDER[lang])
    shutil.rmtree(sources)
    if problems:
        raise ConfigError("links of the book lead nowhere:\n" + "\n".join(problems))
    return output / "index.html"


def _generate(site: Site, target: Path) -> None:
    for asset in ("book.css", "iframe-worker.js"):
        shutil.copyfile(Path(__file__).with_name(asset), site.docs / asset)
    from mkdocs.commands.build import build as run
    from mkdocs.config import load_config
    logging.getLogger("mkdocs").setLevel(logging.WARNING)
    config = load_config(config_file=str(_config_file(site, target)))
    run(config)


def _config_file(site: Site, target: Path) -> Path:
    file = site.docs.parent / f"{site.docs.name}.yml"
    file.write_text(json.dumps(settings(site, target), ensure_ascii=False, indent=1), encoding="utf-8")   # JSON is YAML
    return file


def settings(site: Site, target: Path) -> dict[str, Any]:
    """The generator's configuration."""
    light = {"media": "(prefers-color-scheme: light)", "scheme": "default", "primary": "white", "accent": "indigo",
             "toggle": {"icon": "material/weather-night", "name": "dark"}}
    dark = {"media": "(prefers-color-scheme: dark)", "scheme": "slate", "primary": "black", "accent": "indigo",
            "toggle": {"icon": "material/weather-sunny", "name": "light"}}
    theme = {"name": "material", "language": _THEME_LANGUAGE[site.lang], "font": False, "palette": [light, dark],
             "features": ["navigation.footer", "navigation.indexes", "navigation.top", "toc.follow", "search.highlight",
                          "search.suggest", "content.code.copy", "navigation.tracking"]}
    other = [{"name": "English", "link": "./" if site.lang == "en" else "../", "lang": "en"},
             {"name": "中文", "link": "zh/" if site.lang == "en" else "./", "lang": "zh"}]
    return {"site_name": _NAMES[site.lang], "docs_dir": str(site.docs), "site_dir": str(target), "theme": theme,
            "use_directory_urls": False, "nav": site.nav(), "extra_css": ["book.css"],
            "hooks": [str(Path(__file__).with_name("hook.py"))], "plugins": ["search", "offline"],
            "extra": {"alternate": other, "generator": False, "polyfills": ["iframe-worker.js"]},
            "copyright": "Apache-2.0", "validation": {"nav": {"omitted_files": "ignore"}}}
