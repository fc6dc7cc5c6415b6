"""Package discovery; everything else about the package is in pyproject.toml.

``passes/`` and ``kernels/`` lie at the top level of the repository and are installed as
``flashnorm_compile.passes`` and ``flashnorm_compile.kernels``. setuptools' declarative discovery
cannot rename what it finds, and a list written by hand would miss new sub-packages.
"""

from setuptools import find_packages, setup

PACKAGE = "flashnorm_compile"
TOP_LEVEL = ("passes", "kernels")

packages = find_packages(include=[PACKAGE, f"{PACKAGE}.*"])
for folder in TOP_LEVEL:
    found = find_packages(include=[folder, f"{folder}.*"])
    packages += [f"{PACKAGE}.{name}" for name in found]

setup(
    packages=packages,
    package_dir={f"{PACKAGE}.{folder}": folder for folder in TOP_LEVEL},
)
