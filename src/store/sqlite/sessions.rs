//! Sessions as a whole: see [`SessionStore`].

use async_trait::async_trait;

use super::Sqlite;
use crate::message::SessionId;
use crate::store::sessions::{
    Fork, Forked, ListRecent, Look, RecentPage, Rewind, Rewound, Seen, SessionStore, Update,
};
use crate::store::{Bell, Result};

#[async_trait]
impl SessionStore for Sqlite {
    async fn look(&self, _session: &SessionId, _look: Look) -> Result<Seen> {
        todo!("comes with the store's part")
    }

    async fn update_session(&self, _session: &SessionId, _update: Update) -> Result<Option<Seen>> {
        todo!("comes with the store's part")
    }

    async fn list_sessions(&self, _list: ListRecent) -> Result<RecentPage> {
        todo!("comes with the store's part")
    }

    async fn rewind(&self, _session: &SessionId, _rewind: Rewind) -> Result<Rewound> {
        todo!("comes with the store's part")
    }

    async fn fork(&self, _session: &SessionId, _fork: Fork) -> Result<Forked> {
        todo!("comes with the store's part")
    }

    fn bell(&self, _session: &SessionId) -> Bell {
        todo!("comes with the store's part")
    }
}
