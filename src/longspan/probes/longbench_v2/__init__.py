"""LongBench-v2 (Bai et al. 2024): prompts, truncation, extraction, scores and the probe."""

from longspan.probes.longbench_v2.probe import LongBenchV2 as LongBenchV2
