"""The site's side of Fedlink: a daemon that talks to the server, and the runtime that trains.

Importing this package imports nothing else: the trainer process must start in milliseconds.
"""
