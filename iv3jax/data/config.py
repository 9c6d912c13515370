"""What an experiment file may say about its data: frozen dataclasses, filled by train/config.py."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SourceConfig:
    """One set of samples.

    Attributes:
        kind: what reads it, a key of `sources.KINDS`.
        name: what its samples are called in messages; empty: the path's last part, or the kind.
        path: annotation file, meta file or folder; empty for synthetic tasks.
        media_root: folder that media paths in an annotation are relative to; empty: the annotation's own.
        weight: its samples' share of the mixture, relative to the other sources'; 0: its own number of
            samples.
        fps, min_frames, max_frames: of its videos; 0 takes the DataConfig's.
        options: of a synthetic task, `key=value` each.
    """

    kind: str
    name: str = ""
    path: str = ""
    media_root: str = ""
    weight: float = 0.0
    fps: float = 0.0
    min_frames: int = 0
    max_frames: int = 0
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class DataConfig:
    """The mixture, and how its samples are read and packed.

    Attributes:
        sources: of the mixture.
        fps, min_frames, max_frames: how a video is sampled (SPEC §5).
        image_pixels, video_pixels: least and most pixels of a picture, and of a whole video.
        add_vision_id: whether each item of media is numbered in the text (`chat.render`).
        features: feature store (`iv3 data encode`) from which videos are taken; empty decodes them.
        look_ahead: samples that a row may pass over when it is filled; they are the next row's first.
        workers: processes that read samples; 0 reads in a thread of this one.
        timeout: seconds after which a sample is given up and named in the quarantine file.
    """

    sources: tuple[SourceConfig, ...] = ()
    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768
    image_pixels: tuple[int, int] = (4 * 1024, 16384 * 4 * 1024)
    video_pixels: tuple[int, int] = (4 * 4 * 1024, 32768 * 4 * 1024)
    add_vision_id: bool = True
    features: str = ""
    look_ahead: int = 8
    workers: int = 0
    timeout: float = 120.0
