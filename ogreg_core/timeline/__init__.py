"""Long videos: windows slid over hours, smoothed scores, events, and what is drawn of them."""

from ogreg_core.timeline.run import Timeline, TimelineOptions, make_timeline

__all__ = ["Timeline", "TimelineOptions", "make_timeline"]
