"""What the server keeps: one database (tables, queries, migrations) and the bytes (blobs, spool)."""
