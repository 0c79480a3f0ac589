"""Evaluation of running servers on VLMEvalKit's data files: ask, keep the answers, score, compare."""
