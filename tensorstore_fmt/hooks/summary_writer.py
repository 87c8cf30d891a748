"""`SummaryWriter`: what is written for TensorBoard, in a run instead; needs neither.

::

    from tensorstore_fmt.hooks.summary_writer import SummaryWriter

    with SummaryWriter("runs/first") as writer:
        writer.add_scalar("loss", 0.5, global_step=1)

Methods and arguments are those of ``torch.utils.tensorboard.SummaryWriter``. Values keep their
dtype. Tensors, images, sounds and videos are stored as they are, so that slices of them can be
read; histograms as rows of left end, right end and count.
"""

from __future__ import annotations

import os
import socket
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np

from tensorstore_fmt.closeable import Closeable
from tensorstore_fmt.errors import ArgumentError
from tensorstore_fmt.hooks.buckets import as_numpy, buckets
from tensorstore_fmt.hooks.late_run import LateRun

__all__ = ["SummaryWriter"]

_NO_STEP: Final = "without a step"


class SummaryWriter(Closeable):
    """Writes a run, with the methods that users of TensorBoard know.

    Parameters
    ----------
    log_dir, comment
        Where the run is, also a URL; by default ``runs/<time>_<host><comment>``.
    purge_step
        Go on in a run, finished or not: what it holds at this step and later is hidden, and stays
        readable with ``attempt=``. A run that is not finished is gone on in anyway, at the first
        step that is written.
    max_queue, flush_secs, filename_suffix
        Not needed: a run flushes itself (``flush_interval_s``).
    options
        Of `create_run`.
    """

    def __init__(
        self,
        log_dir: str | os.PathLike[str] | None = None,
        comment: str = "",
        purge_step: int | None = None,
        max_queue: int = 10,
        flush_secs: int = 120,
        filename_suffix: str = "",
        **options: Any,
    ) -> None:
        if not log_dir:
            now = time.strftime("%b%d_%H-%M-%S")
            log_dir = os.path.join("runs", f"{now}_{socket.gethostname()}{comment}")
        if purge_step is not None:
            options["resume_from"] = purge_step
        self._run = LateRun(log_dir, **options)
        self._steps: Counter[str] = Counter()
        self._left_out: set[str] = set()
        self.purge_step = purge_step

    @property
    def log_dir(self) -> str:
        """Where the run is."""
        return self._run.url

    def get_logdir(self) -> str:
        """Give where the run is."""
        return self._run.url

    @property
    def run(self) -> LateRun:
        """What takes other values, too: ``writer.run.log({name: value}, step, mode)``."""
        return self._run

    def add_scalar(
        self,
        tag: str,
        scalar_value: Any,
        global_step: int | None = None,
        walltime: float | None = None,
        new_style: bool = False,
        double_precision: bool = False,
    ) -> None:
        """Write a number.

        Parameters
        ----------
        global_step
            None, here and below: the one after the last under this tag.
        walltime
            Here and below: not kept. A step's time is that of its first value.
        """
        if getattr(scalar_value, "shape", ()) != ():
            if np.prod(scalar_value.shape) != 1:
                raise ArgumentError(
                    f"{tag!r}: a scalar has one element, not shape {tuple(scalar_value.shape)}; "
                    "use add_tensor",
                    name=tag,
                )
            scalar_value = scalar_value.reshape(())
        self._write(tag, {tag: scalar_value}, global_step, walltime)

    def add_scalars(
        self,
        main_tag: str,
        tag_scalar_dict: Mapping[str, Any],
        global_step: int | None = None,
        walltime: float | None = None,
    ) -> None:
        """Write several numbers, as ``main_tag/tag``."""
        values = {f"{main_tag}/{tag}": value for tag, value in tag_scalar_dict.items()}
        self._write(main_tag, values, global_step, walltime)

    def add_tensor(
        self,
        tag: str,
        tensor: Any,
        global_step: int | None = None,
        walltime: float | None = None,
    ) -> None:
        """Write a tensor of any shape."""
        self._write(tag, {tag: tensor}, global_step, walltime)

    def add_histogram(
        self,
        tag: str,
        values: Any,
        global_step: int | None = None,
        bins: Any = "tensorflow",
        walltime: float | None = None,
        max_bins: int | None = None,
    ) -> None:
        """Write counts of values in buckets: float64 of shape (buckets, 3).

        Parameters
        ----------
        max_bins
            Most buckets: then they have the same width.
        """
        rows = buckets(tag, values, bins)
        if max_bins is not None and len(rows) > max_bins:
            rows = buckets(tag, values, max_bins)
        self._write(tag, {tag: rows}, global_step, walltime)

    def add_histogram_raw(
        self,
        tag: str,
        min: float,
        max: float,
        num: int,
        sum: float,
        sum_squares: float,
        bucket_limits: Sequence[float],
        bucket_counts: Sequence[float],
        global_step: int | None = None,
        walltime: float | None = None,
    ) -> None:
        """Write a histogram that was counted elsewhere; `bucket_limits` are right ends."""
        right = np.asarray(bucket_limits, np.float64)
        left = np.concatenate([[float(min)], right[:-1]])
        rows = np.stack([left, right, np.asarray(bucket_counts, np.float64)], axis=1)
        facts = {"min": min, "max": max, "num": num, "sum": sum, "sum_squares": sum_squares}
        values = {f"{tag}/{name}": float(value) for name, value in facts.items()}
        self._write(tag, {tag: rows, **values}, global_step, walltime)

    def add_image(
        self,
        tag: str,
        img_tensor: Any,
        global_step: int | None = None,
        walltime: float | None = None,
        dataformats: str = "CHW",
    ) -> None:
        """Write a picture, with its axes in the order height, width, channel."""
        image = _in_order(tag, img_tensor, dataformats, "HWC")
        self._write(tag, {tag: image}, global_step, walltime)

    def add_images(
        self,
        tag: str,
        img_tensor: Any,
        global_step: int | None = None,
        walltime: float | None = None,
        dataformats: str = "NCHW",
    ) -> None:
        """Write pictures, with their axes in the order number, height, width, channel."""
        images = _in_order(tag, img_tensor, dataformats, "NHWC")
        self._write(tag, {tag: images}, global_step, walltime)

    def add_image_with_boxes(
        self,
        tag: str,
        img_tensor: Any,
        box_tensor: Any,
        global_step: int | None = None,
        walltime: float | None = None,
        rescale: float = 1,
        dataformats: str = "CHW",
        labels: Sequence[str] | None = None,
    ) -> None:
        """Write a picture, ``tag/boxes`` and ``tag/labels``."""
        values = {tag: _in_order(tag, img_tensor, dataformats, "HWC"), f"{tag}/boxes": box_tensor}
        self._write(tag, {**values, f"{tag}/labels": _texts(labels)}, global_step, walltime)

    def add_figure(
        self,
        tag: str,
        figure: Any,
        global_step: int | None = None,
        close: bool = True,
        walltime: float | None = None,
    ) -> None:
        """Write a figure of matplotlib as a picture, several as ``tag/0`` and so on."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        several = isinstance(figure, list | tuple)
        values = {}
        for number, each in enumerate(figure if several else [figure]):
            canvas: Any = FigureCanvasAgg(each)
            canvas.draw()
            values[f"{tag}/{number}" if several else tag] = np.array(canvas.buffer_rgba())[..., :3]
            if close:
                from matplotlib import pyplot as plt

                plt.close(each)
        self._write(tag, values, global_step, walltime)

    def add_video(
        self,
        tag: str,
        vid_tensor: Any,
        global_step: int | None = None,
        fps: float = 4,
        walltime: float | None = None,
    ) -> None:
        """Write a video as it is, and ``tag/fps``."""
        self._write(tag, {tag: vid_tensor, f"{tag}/fps": fps}, global_step, walltime)

    def add_audio(
        self,
        tag: str,
        snd_tensor: Any,
        global_step: int | None = None,
        sample_rate: int = 44100,
        walltime: float | None = None,
    ) -> None:
        """Write a sound as it is, and ``tag/sample_rate``."""
        values = {tag: snd_tensor, f"{tag}/sample_rate": sample_rate}
        self._write(tag, values, global_step, walltime)

    def add_text(
        self,
        tag: str,
        text_string: str,
        global_step: int | None = None,
        walltime: float | None = None,
    ) -> None:
        """Write a string."""
        self._write(tag, {tag: text_string}, global_step, walltime)

    def add_embedding(
        self,
        mat: Any,
        metadata: Sequence[Any] | None = None,
        label_img: Any = None,
        global_step: int | None = None,
        tag: str = "default",
        metadata_header: Sequence[str] | None = None,
    ) -> None:
        """Write points of shape (n, dimensions), with ``tag/metadata`` and ``tag/label_img``.

        With `metadata_header`, each column of `metadata` is ``tag/metadata/<its header>``.
        """
        values: dict[str, object] = {tag: mat, f"{tag}/label_img": label_img}
        if metadata is not None and metadata_header:
            for number, header in enumerate(metadata_header):
                column = _texts(row[number] for row in metadata)
                values[f"{tag}/metadata/{header}"] = column
        else:
            values[f"{tag}/metadata"] = _texts(metadata)
        self._write(tag, values, global_step, None)

    def add_mesh(
        self,
        tag: str,
        vertices: Any,
        colors: Any = None,
        faces: Any = None,
        config_dict: Mapping[str, object] | None = None,
        global_step: int | None = None,
        walltime: float | None = None,
    ) -> None:
        """Write ``tag/vertices``, ``tag/colors`` and ``tag/faces``."""
        values = {f"{tag}/vertices": vertices, f"{tag}/colors": colors, f"{tag}/faces": faces}
        self._write(tag, values, global_step, walltime)

    def add_pr_curve(
        self,
        tag: str,
        labels: Any,
        predictions: Any,
        global_step: int | None = None,
        num_thresholds: int = 127,
        weights: Any = None,
        walltime: float | None = None,
    ) -> None:
        """Write what a curve of precision and recall is made from."""
        values = {"labels": labels, "predictions": predictions, "weights": weights}
        self._write(tag, _below(tag, values), global_step, walltime)

    def add_pr_curve_raw(
        self,
        tag: str,
        true_positive_counts: Any,
        false_positive_counts: Any,
        true_negative_counts: Any,
        false_negative_counts: Any,
        precision: Any,
        recall: Any,
        global_step: int | None = None,
        num_thresholds: int = 127,
        weights: Any = None,
        walltime: float | None = None,
    ) -> None:
        """Write a curve that was counted elsewhere."""
        values = {
            "true_positive_counts": true_positive_counts,
            "false_positive_counts": false_positive_counts,
            "true_negative_counts": true_negative_counts,
            "false_negative_counts": false_negative_counts,
            "precision": precision,
            "recall": recall,
            "weights": weights,
        }
        self._write(tag, _below(tag, values), global_step, walltime)

    def add_hparams(
        self,
        hparam_dict: Mapping[str, Any],
        metric_dict: Mapping[str, Any],
        hparam_domain_discrete: Mapping[str, Sequence[Any]] | None = None,
        run_name: str | None = None,
        global_step: int | None = None,
    ) -> None:
        """Keep hyper-parameters (`LateRun.set_hparams`), and write what came of them."""
        self._run.set_hparams(hparam_dict)
        self._write(_NO_STEP, metric_dict, global_step, None)

    def add_graph(
        self,
        model: Any,
        input_to_model: Any = None,
        verbose: bool = False,
        use_strict_trace: bool = True,
    ) -> None:
        """Warn once: a run has no place for graphs."""
        self._leave_out("add_graph")

    def add_onnx_graph(self, prototxt: Any) -> None:
        """Warn once: a run has no place for graphs."""
        self._leave_out("add_onnx_graph")

    def add_custom_scalars(self, layout: Any) -> None:
        """Warn once: how a page shows curves is not kept."""
        self._leave_out("add_custom_scalars")

    def add_custom_scalars_multilinechart(
        self,
        tags: Sequence[str],
        category: str = "default",
        title: str = "untitled",
    ) -> None:
        """Warn once: how a page shows curves is not kept."""
        self._leave_out("add_custom_scalars_multilinechart")

    def add_custom_scalars_marginchart(
        self,
        tags: Sequence[str],
        category: str = "default",
        title: str = "untitled",
    ) -> None:
        """Warn once: how a page shows curves is not kept."""
        self._leave_out("add_custom_scalars_marginchart")

    def flush(self) -> None:
        """Make visible what was written."""
        self._run.flush()

    def close(self) -> None:
        """Close the run; writing after that opens it again, and hides nothing."""
        self._run.close()

    def _write(
        self,
        tag: str,
        values: Mapping[str, object],
        global_step: Any,
        walltime: float | None,
    ) -> None:
        step = self._steps[tag] if global_step is None else int(global_step)
        self._steps[tag] = max(self._steps[tag], step + 1)
        self._run.log(values, step)

    def _leave_out(self, what: str) -> None:
        if what not in self._left_out:
            self._left_out.add(what)
            warnings.warn(f"{what}: a run has no place for it", RuntimeWarning, stacklevel=3)


def _below(tag: str, values: Mapping[str, object]) -> dict[str, object]:
    return {f"{tag}/{name}": value for name, value in values.items()}


def _texts(values: Iterable[object] | None) -> list[str] | None:
    return None if values is None else [str(value) for value in values]


def _in_order(tag: str, image: object, axes: str, wanted: str) -> object:
    """Give a picture with its axes in the wanted order, adding those that it lacks."""
    array = as_numpy(tag, image)
    given = axes.upper()
    is_known = len(set(given)) == len(given) and set("HW") <= set(given) <= set(wanted)
    if not is_known or len(given) != array.ndim:
        raise ArgumentError(
            f"{tag!r} has shape {array.shape} and dataformats {axes!r}; that is one letter for "
            f"each axis, of {', '.join(wanted)}",
            name=tag,
        )
    for missing in set(wanted) - set(given):
        array, given = array[..., np.newaxis], given + missing
    return array.transpose([given.index(axis) for axis in wanted])
