-- Who may sign in, said once: sessions, API tokens and every way in ask this.
ALTER TABLE users
    ADD COLUMN may_sign_in boolean NOT NULL GENERATED ALWAYS AS (NOT auth_reset_required AND NOT directory_disabled) STORED;

-- The administrators who can rescue the engine: those whose password is ours. Without one, nobody is let in but to recover one.
CREATE VIEW ready_admins AS
    SELECT id FROM users WHERE role = 'Admin' AND auth_source = 'local' AND NOT auth_reset_required AND password_sealed IS NOT NULL;
