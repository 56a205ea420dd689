//! BoxLite at work: one runtime, asked one thing after the other.

use std::time::{Duration, Instant};

use serde_json::Value;

use super::TestHome;
use super::wheel::Conversation;

/// A runtime that has the home until the value is dropped.
pub struct Session(Conversation);

impl Session {
    /// Starts BoxLite; it has the home's lock when this returns.
    pub fn start(home: &TestHome) -> Session {
        let mut session = Session(Conversation::begin(home.root()));
        session.begin();
        session
    }

    /// Has BoxLite's runtime begin. It fails at once while a mount that merges by itself has the lock, for
    /// some milliseconds; whoever starts a program then starts it again.
    fn begin(&mut self) {
        let deadline = Instant::now() + super::PATIENCE;
        while let Err(refusal) = self.ask(&["start"]) {
            let is_held = refusal.contains("Another BoxliteRuntime");
            assert!(is_held && Instant::now() < deadline, "BoxLite: {refusal}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Has BoxLite do something; the error is its message.
    pub fn ask(&mut self, command: &[&str]) -> Result<Value, String> {
        self.0.say(command);
        let answer = self.0.answer();
        let answer = answer.unwrap_or_else(|| panic!("BoxLite ended: {command:?}"));
        match answer.get("error") {
            Some(error) => Err(error.to_string()),
            None => Ok(answer),
        }
    }

    /// Likewise, what it may not refuse.
    pub fn must(&mut self, command: &[&str]) -> Value {
        self.ask(command)
            .unwrap_or_else(|refusal| panic!("BoxLite: {command:?}: {refusal}"))
    }
}
