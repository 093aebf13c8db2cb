"""Evaluation under averaged weights inside trainers, each module needing its trainer's package."""
