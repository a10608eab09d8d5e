"""Fixtures of search spaces, from which a rank check draws."""

from space_fixtures import draw as draw
from space_fixtures import resnet as resnet
from space_fixtures import space as space
from space_fixtures import within as within
