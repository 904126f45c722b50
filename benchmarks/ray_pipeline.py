"""The peer of whole jobs: transformers' pipeline in `map_batches`, as Ray Data's documentation shows it.

    python -m benchmarks.ray_pipeline MODEL CORPUS OUTPUT DTYPE THREADS

One actor with all threads. The pipeline truncates documents to the model's positions. The last line printed is the
seconds of the dataset's execution. The output has each document's `id` and `label`, and when its batch started and
ended, in seconds since the epoch.
"""

import sys
import time
from typing import Any

import ray


class Classifier:
    def __init__(self, model: str, dtype: str, threads: int):
        import torch
        from transformers import pipeline

        torch.set_num_threads(threads)  # Ray gives an actor one
        self.pipeline = pipeline("text-classification", model=model, dtype=dtype)
        self.positions = self.pipeline.model.config.max_position_embeddings

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        started = time.time()
        predictions = self.pipeline(list(batch["text"]), truncation=True, max_length=self.positions)
        count = len(predictions)
        return {
            "id": batch["id"],
            "label": [prediction["label"] for prediction in predictions],
            "started": [started] * count,
            "ended": [time.time()] * count,
        }


def main() -> None:
    model, corpus, output, dtype, threads = sys.argv[1:]
    ray.init(log_to_driver=False)
    started = time.perf_counter()
    ray.data.read_parquet(corpus).map_batches(
        Classifier,
        fn_constructor_args=(model, dtype, int(threads)),
        batch_size=64,
        num_cpus=1,  # an actor that takes every CPU leaves none to the readers, and nothing moves
        compute=ray.data.ActorPoolStrategy(size=1),
    ).write_parquet(output)
    print(time.perf_counter() - started)


if __name__ == "__main__":
    main()
