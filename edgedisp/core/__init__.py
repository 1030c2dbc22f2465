"""What every package may use: errors, progress, paths, stage folders, the processes of a launch.

Nothing here imports another package of edgedisp, torch or onnxruntime.
"""
