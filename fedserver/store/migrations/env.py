"""Alembic's entry: run on the connection that `upgrade` hands over."""

from __future__ import annotations

from alembic import context

from fedserver.store.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()
