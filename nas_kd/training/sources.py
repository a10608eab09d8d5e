"""The names that stood here before the data had a room of its own: `nas_kd.data.sources`."""

from nas_kd.data.sources import Source as Source
from nas_kd.data.sources import open_source as open_source
