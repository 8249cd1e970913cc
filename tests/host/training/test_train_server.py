"""Train Adapter through the started server: stopped from the page, gone on with, used in the same graph."""

from __future__ import annotations

from typing import Any

import numpy as np

from demo_model.draw import draw_concept
from spectral_core.training.runs.events import read_events
from tests.host.booted import Host
from tests.host.graphs import Graph, node, picture, pictures_of
from tests.host.watching import Run, Socket, history, is_end, submit, succeed

STEPS = 60
PROMPT = "a house on a blue background"


def graph(name: str, **changes: Any) -> Graph:
    """Train on a folder, apply, and draw with and without."""
    given = {
        "run_name": name, "images": "houses", "trigger_word": "", "preset": "an object", "method": "lora",
        "rank": 4, "steps": STEPS, "sample_every": 20,
    }  # fmt: skip
    demo = {name: ["demo", i] for i, name in enumerate(("model", "clip", "vae"))}
    return {
        "demo": node("SpectralAdapters_LoadDemoModel"),
        "layers": options("TrainLayers", targets="*mid_block*attn*"),
        "memory": options("TrainMemory", ["layers", 0], batch_size=2, resolution=128),
        "optimiser": options("TrainOptimiser", ["memory", 0], learning_rate=0.01, seed=1),
        "train": node(
            "SpectralAdapters_TrainAdapter", **demo, options=["optimiser", 0], **{**given, **changes}
        ),
        "apply": node(
            "SpectralAdapters_ApplyAdapter", model=demo["model"], adapter=["train", 0], strength_model=1.0,
            strength_clip=1.0, mode="auto", base_mismatch="delta",
        ),
        **picture(["apply", 0], demo["clip"], demo["vae"], PROMPT, steps=4),
        **picture(demo["model"], demo["clip"], demo["vae"], PROMPT, steps=4, tag="base"),
    }  # fmt: skip


def options(kind: str, before: Any = None, **changes: Any) -> dict[str, Any]:
    """An option node, behind another one."""
    return node(f"SpectralAdapters_{kind}", **changes, **({"options": before} if before else {}))


def stopped(host: Host, prompt: Graph, at: int) -> Run:
    """Run a prompt and press stop once training has come to a step."""
    with Socket(host) as listener:
        prompt_id = submit(host, prompt, listener.client_id)
        asked, messages = False, []
        for message in listener.messages():
            messages.append(message)
            data = message["data"]
            about = message["type"] == "progress" and data.get("node") == "train"
            if about and data["value"] >= at and not asked:
                host.post("/interrupt", {})
                asked = True
            if is_end(message, prompt_id):
                break
    return Run(history(host, prompt_id), messages)


def test_stopped_from_the_page_resumed_and_used_in_the_same_graph(host: Host) -> None:
    folder = host.folder / "input" / "houses"
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(2):
        drawn, caption = draw_concept("house", i)
        drawn.save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption, encoding="utf-8")
    first = stopped(host, graph("stopped"), at=5)
    assert first.event("execution_interrupted")["node_id"] == "train", first.entry["status"]
    run = host.folder / "output" / "spectral_adapters_runs" / "stopped"
    done = int(next(run.glob("checkpoint-*")).stem.split("-")[1])
    assert 5 <= done < STEPS
    second = succeed(host, graph("stopped"))
    events = read_events(run / "events.jsonl")
    assert [e["step"] for e in events if e["event"] == "resume"] == [done]
    assert [e["step"] for e in events if e["event"] == "step"] == list(range(1, STEPS + 1))
    shown = second.progress("train")
    assert shown and shown[0] > done and shown[-1] == STEPS, "the bar goes on where it stopped"
    with_it, base = (np.asarray(pictures_of(host, second.entry, s)[0]) for s in ("save", "savebase"))
    assert not np.array_equal(with_it, base), "the adapter acts in the same graph"
    whole = succeed(host, graph("whole"))
    assert np.array_equal(np.asarray(pictures_of(host, whole.entry, "save")[0]), with_it)
    assert np.array_equal(np.asarray(pictures_of(host, whole.entry, "savebase")[0]), base)
