"""Everything but the folder map is in pyproject.toml.

The kernels live at the top level, where kernel engineers look, and install as `endoreward_fast.kernels`: a top-level
package named `kernels` would shadow Hugging Face's package of that name, which transformers imports. For the same
reason kernels/ holds no __init__.py. In a checkout and in an sdist the symlink endoreward_fast/kernels leads to it.
"""

from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.sdist import sdist


class SdistWithSymlink(sdist):
    """setuptools lists files, and a symlink to a folder is none; without it the unpacked tests could not run."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        Path(base_dir, "endoreward_fast", "kernels").symlink_to(Path("..", "kernels"))


setup(
    cmdclass={"sdist": SdistWithSymlink},
    packages=[*find_packages(include=["endoreward_fast", "endoreward_fast.*"]), "endoreward_fast.kernels"],
    package_dir={"endoreward_fast.kernels": "kernels"},
    package_data={
        "endoreward_fast": ["py.typed"],
        "endoreward_fast.vocab": ["compiled.cpp"],
        "endoreward_fast.pocket": ["*.json", "*.jinja", "*.safetensors", "*.md", "*.txt"],
        "endoreward_fast.kernels": ["README.md"],
    },
)
