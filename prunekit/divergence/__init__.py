"""How far compressed models' next-token distributions are from their original's.

`run.kld` compares any number of candidates with one reference, one model in memory at a time:

    windows ── the tokens that are read and scored
    reference ── its final hidden states and head, on disk (`capture` is their format)
    candidates, loading ── what is compared, and how it gets into memory
    rows, measuring ── both sides' logits of some positions, reduced at once to statistics
    row_statistics, bootstrap ── what is reported of them
    result, ranking, web_page ── table, JSON, CSV and one HTML page

`llama_file` reads and writes the file of llama.cpp's `--kl-divergence-base`, `capture` what other
engines may write. `two_models` is the same comparison of two models that are both in memory.
"""
