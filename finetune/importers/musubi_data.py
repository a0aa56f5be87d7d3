"""The datasets of musubi-tuner: [general] and [[datasets]] of a TOML file."""

from finetune.importers import common
from finetune.importers.common import ClipFolder
from finetune.importers.draft import Draft
from finetune.importers.families import FPS, base_of, legal_area, legal_bucket, why_not
from finetune.importers.settings import Settings, flag, integer, integers, number, text
from finetune.recipe.bucket import Area, Bucket
from finetune.runtime.errors import UserError

_WINDOWS = {"head": "head", "chunk": "all", "slide": "all", "uniform": "random", "full": "head"}
_DROPPED = {
    "cache_directory": "all that is cached is in data.cache, known by its content",
    "bucket_no_upscale": "clips are scaled until they cover their bucket; check --report shows which are enlarged",
    "control_directory": "no family here takes control images",
    "multiple_target": "no family here has several targets",
    "debug_dataset": "check --report DIR shows each clip as the model will see it",
}
_PATHS = ("video_directory", "video_jsonl_file", "image_directory", "image_jsonl_file")


def put_data(draft: Draft, config: Settings) -> tuple[list[ClipFolder], int, str]:
    """Set [data]; returns the datasets, the batch, and how the source writes that."""
    general, entries = config.table("general"), config.tables("datasets")
    if not entries:
        raise UserError("no [[datasets]] in it", "give the TOML of --dataset_config", config.file)
    found, lengths, areas, batches, paths = [], [], [], [], []
    is_found = False
    batch_setting = "batch_size is 1"
    for entry in entries:
        path, is_list, setting = _path(draft, entry)
        paths.append(setting)
        entry.values = {**general.values, **entry.values}
        found.append(ClipFolder(path, entry.take("num_repeats", number, 1)))
        areas.append(_area(entry))
        is_found = entry.take("enable_bucket", flag, False) or is_found
        batches.append(max(1, entry.take("batch_size", integer, 1)))
        batch_setting = entry.spelled("batch_size") if "batch_size" in entry else batch_setting
        own = _lengths(draft, entry)
        found[-1].views = len(set(own)) * _pieces(entry)
        lengths += own
        _frames(draft, entry)
        extension = entry.take("caption_extension", text, ".txt")
        if extension not in (".txt", ".json", ""):
            draft.drop(entry.spelled("caption_extension"), "captions are .txt files beside the clips; rename them")
            draft.todo.append(f"captions end with {extension} there: rename them to .txt")
        elif "caption_extension" in entry and not is_list:
            draft.read(entry.spelled("caption_extension"), "captions beside the clips are found by themselves")
        entry.drop(draft, _DROPPED)
        for name in ("num_repeats", "resolution", "enable_bucket"):
            if name in entry:
                draft.read(entry.spelled(name), "it is in [data]")
        entry.said.add(setting.split()[0].rpartition(".")[2])
        entry.name_the_rest(draft)
    common.put_datasets(draft, ", ".join(paths), found)
    _shapes(draft, areas, sorted(set(lengths)), is_found)
    config.name_the_rest(draft)
    if len(set(batches)) > 1:
        draft.drop(f"batch_size of {batches}", "a run has one batch: the least is taken")
    return found, min(batches), batch_setting


def _path(draft: Draft, entry: Settings) -> tuple[str, bool, str]:
    """Where a dataset lies, whether that is a list, and how the source writes it."""
    for name in _PATHS:
        if path := entry.take(name, text, ""):
            is_list = "jsonl" in name
            if is_list:
                column = "video_path" if "video" in name else "image_path"
                draft.default(f"{name} has the column {column}", "data.video_column", column, "as it is called there")
            return path, is_list, entry.spelled(name)
    raise UserError("a dataset has no video_directory and no video_jsonl_file", "add one", entry.file)


def _area(entry: Settings) -> Area:
    size = entry.take("resolution", integers, [960, 544])
    if not size or len(size) > 2 or min(size) < 1:
        raise UserError(f"resolution = {size} is no size", "write resolution = [width, height]", entry.file)
    return Area(size[-1], size[0])


def _lengths(draft: Draft, entry: Settings) -> list[int]:
    if not any(entry.values.get(name) for name in ("video_directory", "video_jsonl_file")):
        return [1]
    kind = entry.take("frame_extraction", text, "head")
    longest = entry.take("max_frames", integer, 129)
    lengths = entry.take("target_frames", integers, [1])
    if kind == "full":
        draft.change(
            entry.spelled("frame_extraction"),
            "data.window",
            "head",
            f"each clip has one length, at most max_frames = {longest}",
        )
        return [longest]
    if "target_frames" in entry:
        draft.read(
            entry.spelled("target_frames"),
            "data.frames or data.buckets have them; a clip has the longest that it can fill, not each",
        )
    entry.drop(draft, {"max_frames": "it is for frame_extraction = full"})
    return [each for each in lengths if each > 0] or [1]


def _pieces(entry: Settings) -> int:
    """How many pieces of each length an epoch has of a clip. Of "chunk" and "slide" as many as fit: one is what is known."""
    if entry.take("frame_extraction", text, "") != "uniform":
        return 1
    return max(1, entry.take("frame_sample", integer, 1))


def _frames(draft: Draft, entry: Settings) -> None:
    kind = entry.take("frame_extraction", text, None)
    if kind in _WINDOWS and kind != "full":
        how = {"head": "", "uniform": "pieces at random places, of which each epoch takes another"}.get(
            kind, "pieces one after the other"
        )
        draft.change(
            entry.spelled("frame_extraction"), "data.window", _WINDOWS[kind], how or "the first frames of a clip"
        )
    count = entry.take("frame_sample", integer, None)
    if count and kind == "uniform":
        draft.move(entry.spelled("frame_sample"), "data.windows", count)
    elif count is not None:
        draft.drop(entry.spelled("frame_sample"), "it is for frame_extraction = uniform")
    stride = entry.take("frame_stride", integer, None)
    if stride is not None:
        draft.drop(entry.spelled("frame_stride"), "data.overlap is the share of a piece that the next one repeats")
    rate = entry.take("source_fps", number, None)
    if rate is not None:
        fps = 24 if "TI2V-5B" in str(draft.get("model.path", "")) else FPS[base_of(draft.family)]
        draft.change(
            entry.spelled("source_fps"),
            "data.fps",
            fps,
            "a clip's rate is read from its file; this is the model's, to which it is brought",
        )


def _shapes(draft: Draft, areas: list[Area], lengths: list[int], is_found: bool) -> None:
    legal = [legal_bucket(draft, Bucket(length, *areas[0])).frames for length in lengths]
    more = "" if legal == lengths else f"{why_not(draft)}: {lengths} are {legal}"
    if is_found:
        area = max(areas, key=lambda each: each.height * each.width)
        frames = draft.put("data.frames", sorted(set(legal)))
        several = "the largest of all" if len(set(areas)) > 1 else ""
        text_ = "; ".join(
            filter(None, ["width x height there; shapes are found for the clips' aspect ratios", several, frames, more])
        )
        draft.change("resolution with enable_bucket", "data.area", str(legal_area(draft, area)), text_)
        return
    buckets = [Bucket(length, *area) for area in dict.fromkeys(areas) for length in lengths]
    common.put_buckets(draft, "resolution with target_frames", buckets, "width x height there")
