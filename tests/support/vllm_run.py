"""vLLM in a process of its own: reads a job from a file, writes what was generated and vLLM's counters beside it.

A job has `model`, `options` of `LLM`, and `runs`, each with `prompts` (token ids) and `sampling`.
"""

import json
import sys
from pathlib import Path


def main(job_file: Path) -> None:
    from vllm import LLM, SamplingParams

    job = json.loads(job_file.read_text())
    engine = LLM(job["model"], enforce_eager=True, disable_log_stats=False, max_num_seqs=4, **job["options"])
    results, before = [], {}
    for run in job["runs"]:
        prompts = [{"prompt_token_ids": tokens} for tokens in run["prompts"]]
        outputs = engine.generate(prompts, SamplingParams(**run["sampling"]), use_tqdm=False)
        now = {metric.name: metric.value for metric in engine.get_metrics() if hasattr(metric, "value")}
        counted = {name: value - before.get(name, 0) for name, value in now.items() if "spec_decode" in name}
        results.append({"tokens": [list(output.outputs[0].token_ids) for output in outputs], "counted": counted})
        before = now
    job_file.with_suffix(".out").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
