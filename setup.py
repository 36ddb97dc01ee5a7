"""What pyproject.toml cannot say about building natsrt: an editable install for type checkers, and the index page.

**Editable installs.** The folder ``cli`` is installed as ``natsrt_cli``, so setuptools installs a checkout through an
import hook. Type checkers run no hooks, and do not find natsrt then. So `editable_wheel` adds a ``.pth`` file with the
path of the checkout, which they follow.

**The index page.** Relative links and pictures of README.md lead nowhere outside a checkout. `index_page` makes them
absolute.
"""

from __future__ import annotations

import base64
import hashlib
import re
import tomllib
import zipfile
from pathlib import Path

from setuptools import setup
from setuptools.command.editable_wheel import editable_wheel as setuptools_editable_wheel

ROOT = Path(__file__).resolve().parent
_PATH_FILE = "natsrt-checkout.pth"
_RELATIVE_PICTURE = re.compile(r"!\[([^\]\[]*)\]\((?!https?:)([^)\s]+)\)\n*")
_RELATIVE_LINK = re.compile(r"(?<!!)\[([^\]\[]*)\]\((?!https?:|#)([^)\s#]+)(#[^)\s]*)?\)")


class editable_wheel(setuptools_editable_wheel):
    """Makes setuptools' editable wheel, and adds the path of the checkout to it."""

    def run(self) -> None:
        super().run()
        (wheel,) = Path(self.dist_dir).glob("natsrt-*editable*.whl")
        add_to_wheel(wheel, _PATH_FILE, f"{ROOT}\n".encode())


def add_to_wheel(wheel: Path, name: str, content: bytes) -> None:
    """Add a file to a wheel, and to the wheel's own list of its files."""
    with zipfile.ZipFile(wheel) as old:
        files = {info: old.read(info) for info in old.infolist()}
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as new:
        new.writestr(name, content)
        for info, data in files.items():
            if info.filename.endswith(".dist-info/RECORD"):
                data += f"{name},sha256={digest},{len(content)}\n".encode()
            new.writestr(info, data)


def index_page(readme: str, repository: str | None, version: str) -> str:
    """The README with links that work on every page.

    ``repository`` is the URL of the repository; relative links lead to the files of this version there. None: the
    project names no repository. A relative link becomes its text with the path in the source distribution then, and
    pictures are left out.
    """

    def picture(found: re.Match[str]) -> str:
        if repository is None:
            return ""
        return found[0].replace(f"({found[2]})", f"({repository.rstrip('/')}/raw/v{version}/{found[2]})")

    def absolute(found: re.Match[str]) -> str:
        text, path, anchor = found.groups()
        if repository is not None:
            return f"[{text}]({repository.rstrip('/')}/blob/v{version}/{path}{anchor or ''})"
        return text if text == path else f"{text} ({path})"

    return _RELATIVE_LINK.sub(absolute, _RELATIVE_PICTURE.sub(picture, readme))


if __name__ == "__main__":
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    setup(
        cmdclass={"editable_wheel": editable_wheel},
        long_description=index_page(
            (ROOT / "README.md").read_text("utf-8"), project.get("urls", {}).get("Repository"), project["version"]
        ),
        long_description_content_type="text/markdown",
    )
