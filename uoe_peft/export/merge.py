"""Merge an adapter into a checkpoint on disk, and take it out again, without building the model."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from uoe_peft.export.backup import FILE, Backup, check_backup, write_backup
from uoe_peft.export.checkpoint import Checkpoint
from uoe_peft.export.edits import TensorEdit, plan, slice_edits
from uoe_peft.export.neurons import in_groups, plan_neurons
from uoe_peft.export.output import appearing_at_once, check_vacant, check_writable, is_vacant, sync
from uoe_peft.export.rewriting import Copied, Patch, copy_shards
from uoe_peft.export.saved_adapter import SavedAdapter


@dataclass(frozen=True)
class CheckpointEdit:
    """What was written, or would be.

    Attributes:
        output: The new checkpoint.
        tensors: What changes in each tensor.
        num_bytes: Bytes to be written for the weights, without files that are linked.
        shards: What became of the shards; None for a dry run.
        left_out: Names that the base has and the output has not: weights in other formats, which still hold what was
            forgotten, folders, and shards that were not asked for.
        backup: File with the original slices, or None.
    """

    output: Path
    tensors: tuple[TensorEdit, ...]
    num_bytes: int
    shards: Copied | None
    left_out: tuple[str, ...]
    backup: Path | None

    def summary(self) -> str:
        """Tensors and bytes, one line each."""
        lines = [f"{edit.num_bytes:>14,} bytes  {edit.tensor}  ({edit.shard})" for edit in self.tensors]
        total = sum(edit.num_bytes for edit in self.tensors)
        files = len({edit.shard for edit in self.tensors})
        lines.append(f"{total:>14,} bytes change in {len(self.tensors)} tensors of {files} shards")
        lines.append(f"{self.num_bytes:>14,} bytes {'to write' if self.shards is None else 'written'}")
        if self.shards is not None:
            linked, copied = len(self.shards.linked), len(self.shards.copied)
            lines.append(f"{linked} other shards linked, {copied} copied; {self.output}")
        if self.left_out:
            lines.append(f"left out: {', '.join(self.left_out)}")
        return "\n".join(lines)


def merge_checkpoint(
    base: str | Path,
    adapter: str | Path,
    output: str | Path,
    *,
    dry_run: bool = False,
    link: bool = True,
    backup: str | Path | None = None,
    only_touched: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> CheckpointEdit:
    """Write a checkpoint with an adapter merged into it, bit-equal to `merge_and_unload().save_pretrained`.

    The model is never built: bytes of the edited slices are computed block by block while their shards are copied.
    Memory does not grow with the model. Index, shard boundaries and all other files stay as they are. The output
    appears when it is complete and was read back, or not at all.

    Of a dense model that was factorized, groups of neurons are merged, and the output is an ordinary dense checkpoint,
    bit-equal to what `to_dense(merge_and_unload())` gives.

    Args:
        base: The checkpoint: a folder, or a name on the Hub.
        adapter: A saved UOE adapter, likewise.
        output: Folder to make; it must not exist, or be empty.
        dry_run: Write nothing; say what would change.
        link: Give shards that the adapter does not touch a second name (a hard link) instead of copying them. Nothing
            may write into such a file later, or base and output change together.
        backup: Folder for a file with the original slices, which `unmerge_checkpoint` puts back. It holds what was
            forgotten: keep it from whoever gets the output.
        only_touched: Leave shards out that the adapter does not touch, so that those on the Hub need not be
            downloaded: what comes out is to be laid over a copy of the base.
        revision: Of a base on the Hub.
        trust_remote_code: As in transformers, for a model whose code is not part of it.

    Returns:
        Which tensors changed, the hash of each rewritten shard, and what was left out.

    Raises:
        ValueError: The adapter does not fit the checkpoint, holds more than deltas or values that are not finite; the
            checkpoint is quantised, cut off, or lacks its index; `output` is not empty.
        OSError: The disk is too small, or what was read back is not what was written.
    """
    target = Path(output).absolute()
    check_vacant(target)
    saved, checkpoint = SavedAdapter.open(adapter), Checkpoint.open(base, revision=revision)
    model = checkpoint.meta_model(trust_remote_code=trust_remote_code)
    edits = slice_edits(saved, model)
    tensors, patches = (plan_neurons if in_groups(model) else plan)(edits, checkpoint, model)
    if backup is not None:
        if Path(backup).absolute().is_relative_to(target):
            raise ValueError(f"backup {backup} lies in output {output}, which it must not go with; name another folder")
        check_backup(Path(backup), checkpoint, tensors, patches)
    return _write(
        checkpoint,
        target,
        tensors=tensors,
        patches=patches,
        dry_run=dry_run,
        link=link,
        backup=None if backup is None else Path(backup).absolute(),
        only_touched=only_touched,
    )


def unmerge_checkpoint(
    merged: str | Path, backup: str | Path, output: str | Path, *, dry_run: bool = False, link: bool = True
) -> CheckpointEdit:
    """Write a checkpoint with the original slices put back, bit for bit.

    Args:
        merged: What `merge_checkpoint` wrote.
        backup: The folder that it was given for the original slices.
        output: Folder to make; it must not exist, or be empty.
        dry_run: Write nothing; say what would change.
        link: As in `merge_checkpoint`.

    Returns:
        Which tensors changed, the hash of each rewritten shard, and what was left out.

    Raises:
        ValueError: The backup is of another checkpoint, or broken; `output` is not empty.
        OSError: The disk is too small, or what was read back is not what was written.
    """
    target = Path(output).absolute()
    check_vacant(target)
    saved, checkpoint = Backup.open(Path(backup)), Checkpoint.open(merged)
    tensors, patches = saved.restore(checkpoint)
    return _write(
        checkpoint,
        target,
        tensors=tensors,
        patches=patches,
        dry_run=dry_run,
        link=link,
        backup=None,
        only_touched=False,
    )


def _write(
    checkpoint: Checkpoint,
    output: Path,
    *,
    tensors: list[TensorEdit],
    patches: dict[str, list[Patch]],
    dry_run: bool,
    link: bool,
    backup: Path | None,
    only_touched: bool,
) -> CheckpointEdit:
    shards = [shard for shard in checkpoint.shards if shard in patches or not only_touched]
    small, left_out = checkpoint.other_files
    left_out = [*left_out, *(shard for shard in checkpoint.shards if shard not in shards)]
    if dry_run:
        # To know the sizes of the others on the Hub, they would have to be downloaded.
        counted = [shard for shard in shards if shard in patches or (checkpoint.is_local and not link)]
        num_bytes = sum(checkpoint.shard(shard).path.stat().st_size for shard in counted)
        return CheckpointEdit(output, tuple(tensors), num_bytes, None, tuple(left_out), None)
    sources = {shard: checkpoint.shard(shard).path for shard in shards}
    num_bytes = sum(path.stat().st_size for shard, path in sources.items() if shard in patches or not link)
    beside = sum(path.stat().st_size for path in small)
    had_backup, originals = False, None
    if backup is not None:
        had_backup = (backup / FILE).exists()
        check_writable(backup)
    try:
        with appearing_at_once(output, num_bytes=num_bytes + beside) as folder:
            copied = copy_shards(sources, patches, folder, link=link)
            for path in small:
                shutil.copyfile(path, folder / path.name)
                sync(folder / path.name)
            if backup is not None:  # in its place before the output is: no merge without a way back
                originals = write_backup(backup, checkpoint, tensors, merged=folder)
    except BaseException:
        if originals is not None and not had_backup and is_vacant(output):
            originals.unlink()
        raise
    return CheckpointEdit(output, tuple(tensors), num_bytes, copied, tuple(left_out), originals)
