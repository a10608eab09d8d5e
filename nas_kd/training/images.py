"""The names that stood here before the data had a room of its own: `nas_kd.data.images`."""

from nas_kd.data.images import AugmentedImages as AugmentedImages
from nas_kd.data.images import Batch as Batch
from nas_kd.data.images import Images as Images
from nas_kd.data.images import TrainingData as TrainingData
from nas_kd.data.images import normalise as normalise
