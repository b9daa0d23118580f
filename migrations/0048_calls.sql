-- Where other API processes reach the internal listener of a process, to call the agents whose sockets it has. Empty of a process of an
-- earlier version: its agents cannot be called from others.
ALTER TABLE api_processes ADD COLUMN internal_url text NOT NULL DEFAULT '';
