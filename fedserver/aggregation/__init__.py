"""How a round's updates become the next version, out of core.

check.check_update   one update against the model it belongs to, when its last byte has arrived
presets.pipeline_for the run file's strategy as a pipeline: reducer, then server optimizer
prefix.PrefixSums    sums over the updates that come first, made while others are still out
fold.aggregate       the pass over all updates, window by window, into the files of the next version
"""
