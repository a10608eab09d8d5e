"""The names that stood here before the data had a room of its own: `nas_kd.data.splits`."""

from nas_kd.data.cutting import DataSpec as DataSpec
from nas_kd.data.images import Images as Images
from nas_kd.data.splits import Splits as Splits
from nas_kd.data.splits import load_splits as load_splits
