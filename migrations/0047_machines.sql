-- The machine that a device's identity belongs to, as a hash of its machine id; null until its agent has said it.
ALTER TABLE devices
    ADD COLUMN machine_id text CHECK (length(machine_id) = 64),
    -- Of two agents on machines that cannot be told apart: the one that an operator chose. Cleared when it has renewed its tokens.
    ADD COLUMN chosen_instance uuid,
    ADD COLUMN chosen_at timestamptz,
    ADD CONSTRAINT devices_chosen CHECK ((chosen_instance IS NULL) = (chosen_at IS NULL));

ALTER TABLE device_sockets
    -- A number that an agent makes up at each start; null when it does not say one.
    ADD COLUMN instance uuid,
    -- Another agent that wants to be the device since, while this socket is open.
    ADD COLUMN contested_by uuid,
    ADD COLUMN contested_at timestamptz,
    ADD CONSTRAINT device_sockets_contested CHECK ((contested_by IS NULL) = (contested_at IS NULL));

-- Beside machines that want to enroll: machines that have the identity of a device and are not the one it belongs to.
ALTER TABLE device_approvals
    ADD COLUMN kind text NOT NULL DEFAULT 'enrollment' CHECK (kind IN ('enrollment', 'identity')),
    -- Of an identity: `held` and `current`, each what is known of a machine. Empty otherwise.
    ADD COLUMN facts jsonb NOT NULL DEFAULT '{}';
DROP INDEX device_approvals_open;
CREATE UNIQUE INDEX device_approvals_open ON device_approvals (fingerprint)
    WHERE status IN ('pending', 'approved') AND kind = 'enrollment';
-- A machine waits once.
CREATE UNIQUE INDEX device_approvals_identity ON device_approvals (device_guid, (facts #>> '{held,machine_id}'))
    WHERE status IN ('pending', 'denied') AND kind = 'identity';
