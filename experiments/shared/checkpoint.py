"""Checkpoints: written aside and renamed, read without executing anything."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

VERSION = 1


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """An interruption leaves the old checkpoint or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    torch.save({"version": VERSION, **state}, aside)
    os.replace(aside, path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state, its tensors on the CPU. FileNotFoundError or ValueError where it is no checkpoint of this program."""
    if not path.is_file():
        raise FileNotFoundError(f"expected a checkpoint at {path}, found none")
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or state.get("version") != VERSION:
        found = state.get("version") if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"{path}: expected a checkpoint of version {VERSION}, got {found}")
    return state


def rng_state() -> dict[str, Any]:
    """The state of every random generator that training draws from (dropout); data order needs none, see data.py."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
