"""What both sides of Fedlink share: the protocol, its values and its rules.

Importing this package imports nothing else, so that the trainer process can use
`fedlink.tensors` under a Python that has only numpy.
"""

__version__ = "0.1.0"
PROTOCOL_VERSION = 1
"""The contract in protos/fedlink/v1 that this release speaks."""
MIN_PROTOCOL_VERSION = 1
"""The oldest contract that this release still serves and accepts."""
FEATURES = ("delta", "gradient", "evaluate", "calibrate", "metrics", "reopen", "probe")
"""Optional abilities of this release, by name, exchanged at registration.

delta, gradient: kinds of updates. evaluate: evaluation tasks. calibrate: tasks that measure
settings. metrics: ReportMetrics. reopen: PollTask hands out a held task again if its
update was lost on the server. probe: ProbeDownload and ProbeUpload.
"""
