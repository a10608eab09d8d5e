"""Registers our networks with timm: `import nas_kd.models`, then `timm.create_model` builds what was exported."""

from nas_kd.networks import cifar as cifar
from nas_kd.networks import fuse as fuse
from nas_kd.networks import hub as hub
