"""Networks: blocks and choices, exact costs, students. Importing this registers our models with timm."""

from nas_kd.models import cifar as cifar
from nas_kd.models import hub as hub
