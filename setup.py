"""Everything but the folder map is in pyproject.toml.

The kernels live at the top level, where kernel engineers look, and install as `endoreward_fast.kernels`: a top-level
package named `kernels` would shadow Hugging Face's package of that name, which transformers imports. For the same
reason kernels/ holds no __init__.py. In a checkout the symlink endoreward_fast/kernels leads to it.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["endoreward_fast", "endoreward_fast.*"]), "endoreward_fast.kernels"],
    package_dir={"endoreward_fast.kernels": "kernels"},
    package_data={
        "endoreward_fast": ["py.typed"],
        "endoreward_fast.vocab": ["compiled.cpp"],
        "endoreward_fast.pocket": ["*.json", "*.jinja", "*.safetensors", "*.md", "*.txt"],
        "endoreward_fast.kernels": ["README.md"],
    },
)
