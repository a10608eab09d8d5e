"""Fixtures of search spaces, from which a rank check draws."""

from space_fixtures import resnet as resnet
from space_fixtures import space as space
