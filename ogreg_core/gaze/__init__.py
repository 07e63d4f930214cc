"""What a model looks at: maps out of a model, numbers and pictures out of maps.

``look`` runs one clip of a video; :mod:`.boxes` says where a map lies, :mod:`.motion` how much of it lies
where something moves, :mod:`.pictures` and :mod:`.files` show and keep it.
"""

from ogreg_core.gaze.boxes import boxes_in_video, flat_frames, mass_boxes
from ogreg_core.gaze.files import save_gif, save_maps, save_overlay_video
from ogreg_core.gaze.geometry import ClipGeometry
from ogreg_core.gaze.look import GazeResult, Query, localising_map, look, meanings_of
from ogreg_core.gaze.maps import select_blocks
from ogreg_core.gaze.pictures import overlay, save_sheet

__all__ = [
    "ClipGeometry",
    "GazeResult",
    "Query",
    "boxes_in_video",
    "flat_frames",
    "localising_map",
    "look",
    "mass_boxes",
    "meanings_of",
    "overlay",
    "save_gif",
    "save_maps",
    "save_overlay_video",
    "save_sheet",
    "select_blocks",
]
