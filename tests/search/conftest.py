"""Fixtures of search spaces and of trials on digits."""

from space_fixtures import digits as digits
from space_fixtures import draw as draw
from space_fixtures import make_proxy as make_proxy
from space_fixtures import quiet_optuna as quiet_optuna
from space_fixtures import resnet as resnet
from space_fixtures import small as small
from space_fixtures import space as space
from space_fixtures import within as within
