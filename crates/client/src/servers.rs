//! The servers of one cluster, and the connection to the one that answers.

use std::collections::{BTreeSet, VecDeque};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use cluster::proto::generation_client::GenerationClient;
use cluster::proto::monitor_client::MonitorClient;
use cluster::{KEEP_ALIVE_INTERVAL, KEEP_ALIVE_TIMEOUT, LEADER_METADATA, PUBLIC_MESSAGE_LIMIT};
use tonic::transport::{Channel, Endpoint};
use tonic::{Response, Status};

use crate::Error;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// The services of one server.
#[derive(Debug, Clone)]
pub(crate) struct Service {
    pub(crate) generation: GenerationClient<Channel>,
    pub(crate) monitor: MonitorClient<Channel>,
}

/// Where a cluster can be asked: every server stands for it, but only the leader's generates.
#[derive(Debug)]
pub(crate) struct Servers {
    given: Vec<String>,
    /// The server that answered last.
    current: Mutex<Option<Connection>>,
}

#[derive(Debug, Clone)]
struct Connection {
    address: String,
    service: Service,
}

impl Servers {
    /// Servers at `host:port[,host:port…]`.
    pub(crate) fn parse(addresses: &str) -> Result<Self, Error> {
        let addresses = addresses.split(',').map(|address| {
            let authority = authority(address);
            endpoint(authority).map(|_| authority.to_owned())
        });
        Ok(Self { given: addresses.collect::<Result<_, _>>()?, current: Mutex::new(None) })
    }

    /// Asks one server after the other until one answers or says no for good: first the one that answered last, then as they
    /// were given, and a leader as soon as a server tells of it. Returns the answer and whose it is.
    pub(crate) async fn ask<T, F>(&self, call: impl Fn(Service) -> F) -> Result<(String, T), Error>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let current = self.current().as_ref().map(|connection| connection.address.clone());
        let mut next: VecDeque<String> = current.into_iter().chain(self.given.iter().cloned()).collect();
        let mut asked = BTreeSet::new();
        let mut failure = None;
        while let Some(address) = next.pop_front() {
            if !asked.insert(address.clone()) {
                continue;
            }
            let error = match self.ask_at(&address, &call).await {
                Ok(answer) => return Ok((address, answer)),
                Err(error) => error,
            };
            if !error.is_passing() {
                return Err(error);
            }
            if let Error::Refused(status) = &error
                && let Some(leader) = leader(status)
            {
                next.push_front(leader);
            }
            // A server's own words say more than that another one is out of reach.
            if !matches!(failure, Some(Error::Refused(_))) || matches!(error, Error::Refused(_)) {
                failure = Some(error);
            }
        }
        Err(failure.unwrap_or_else(|| Error::Address(String::new())))
    }

    async fn ask_at<T, F>(&self, address: &str, call: &impl Fn(Service) -> F) -> Result<T, Error>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let connection = self.connection(address).await?;
        match call(connection.service.clone()).await {
            Ok(response) => {
                *self.current() = Some(connection);
                Ok(response.into_inner())
            }
            Err(status) => Err(self.failed(address, status)),
        }
    }

    /// What a status of the server at `address` means; a connection that broke is not used again.
    pub(crate) fn failed(&self, address: &str, status: Status) -> Error {
        let error = Error::from_status(address, status);
        if matches!(error, Error::Lost { .. }) {
            self.current().take_if(|connection| connection.address == address);
        }
        error
    }

    /// The connection at hand, if it leads to `address`, or a new one.
    async fn connection(&self, address: &str) -> Result<Connection, Error> {
        let current = self.current().clone().filter(|connection| connection.address == address);
        if let Some(connection) = current {
            return Ok(connection);
        }
        let channel = endpoint(address)?
            .connect()
            .await
            .map_err(|source| Error::Unreachable { address: address.to_owned(), source })?;
        let monitor = MonitorClient::new(channel.clone());
        let generation = GenerationClient::new(channel)
            .max_decoding_message_size(PUBLIC_MESSAGE_LIMIT)
            .max_encoding_message_size(PUBLIC_MESSAGE_LIMIT);
        Ok(Connection { address: address.to_owned(), service: Service { generation, monitor } })
    }

    fn current(&self) -> std::sync::MutexGuard<'_, Option<Connection>> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An address without what people write around it.
pub(crate) fn authority(address: &str) -> &str {
    let address = address.trim();
    address.strip_prefix("http://").unwrap_or(address).trim_end_matches('/')
}

pub(crate) fn endpoint(address: &str) -> Result<Endpoint, Error> {
    let endpoint = Endpoint::from_shared(format!("http://{address}"))
        .ok()
        .filter(|endpoint| endpoint.uri().port().is_some())
        .ok_or_else(|| Error::Address(address.to_owned()))?;
    Ok(endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
        .keep_alive_timeout(KEEP_ALIVE_TIMEOUT))
}

/// Where the leader is, as a server that stands by tells it.
fn leader(status: &Status) -> Option<String> {
    let address = authority(status.metadata().get(LEADER_METADATA)?.to_str().ok()?);
    endpoint(address).ok().map(|_| address.to_owned())
}
