-- Which data key the secret store has: a new one after every set-up. What is sealed is sealed under the key that is here in the same
-- transaction, so that nothing is sealed any more under one that a reset took.
ALTER TABLE aegis
    ADD COLUMN key_id uuid NOT NULL DEFAULT gen_random_uuid(),
    -- The last link of the audit chain that was made under an earlier key, and a tag of that under this one.
    ADD COLUMN chain_from bigint NOT NULL DEFAULT 0 CHECK (chain_from >= 0),
    ADD COLUMN chain_from_tag bytea CHECK (length(chain_from_tag) = 32);

-- When a reset took what the user signed in with. Counts only while `auth_reset_required`.
ALTER TABLE users ADD COLUMN auth_reset_at timestamptz;
