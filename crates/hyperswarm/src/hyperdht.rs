//! Records, announcements and connections by public key.
