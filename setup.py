"""Install daco_nb: everything is read from settings.ini, so that it is said only once."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    keywords=cfg["keywords"],
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    python_requires=f">={cfg['min_python']},<3.14",
    packages=find_packages(include=["daco_nb", "daco_nb.*"]),
    package_data={"daco_nb": ["assets/*", "assets/*/*", "assets/*/*/*", "assets/*/*/*/*"]},
    install_requires=cfg["requirements"].split(),
    extras_require={"dev": cfg["dev_requirements"].split()},
    entry_points={"console_scripts": cfg["console_scripts"].split(), "nbdev": ["daco_nb=daco_nb._modidx:d"]},
    zip_safe=False,
)
