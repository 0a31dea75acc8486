"""Every SQL statement of the server: functions that take a connection inside a transaction."""
