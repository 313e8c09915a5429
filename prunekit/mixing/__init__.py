"""Which part of a model is compressed how, for the smallest KL from the dense model at a budget.

mixes ── choices per part as plain numbers: what they cost, cheapest mixes, evolution
copies ── compressed copies of the model on disk, part by part, and the model made of them
fitness ── exact KL of the model as it is from its dense self
    measuring ── each mix measured once: alone, in stages, whole, held out
result ── the front of size against KL: table, JSON, CSV, figure
run ── `pk.search`
"""
