//! A TCP proxy in front of Postgres that can be away, silent, slow or narrow, and that counts who knocks.

use std::{
    net::SocketAddr,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpStream, UnixStream},
    sync::watch,
};
use tokio_util::sync::CancellationToken;
use url::Url;

/// The most bytes moved at once.
const CHUNK: usize = 16 * 1024;

/// What the way to Postgres is like.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Line {
    /// New connections are closed at once.
    pub refuses: bool,
    /// Nothing is moved; connections stay open.
    pub stalls: bool,
    /// How long every chunk takes, in each direction.
    pub latency: Duration,
    /// Bytes a second and direction, when bounded.
    pub bytes_per_second: Option<u32>,
}

/// The proxy. Dropping it closes everything.
#[derive(Debug)]
pub struct Proxy {
    /// Where it listens.
    pub addr: SocketAddr,
    shared: Arc<Shared>,
    stop: CancellationToken,
}

#[derive(Debug)]
struct Shared {
    line: watch::Sender<Line>,
    socket: PathBuf,
    connections: Mutex<Vec<Arc<Connection>>>,
    knocks: AtomicU64,
}

#[derive(Debug)]
struct Connection {
    cut: CancellationToken,
    listens: AtomicBool,
}

impl Proxy {
    /// A proxy in front of the server `database` is on, which is reached over a unix socket.
    ///
    /// # Panics
    /// When the URL names no socket folder, or no port is free.
    pub async fn start(database: &Url) -> Self {
        let folder = database.query_pairs().find(|(name, _)| name == "host").map(|(_, folder)| folder.into_owned());
        let folder = folder.unwrap_or_else(|| panic!("{database} names no socket folder"));
        let socket = PathBuf::from(folder).join(format!(".s.PGSQL.{}", database.port().unwrap_or(5432)));
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a free port");
        let addr = listener.local_addr().expect("its address");
        let shared = Arc::new(Shared {
            line: watch::Sender::new(Line::default()),
            socket,
            connections: Mutex::default(),
            knocks: AtomicU64::new(0),
        });
        let stop = CancellationToken::new();
        tokio::spawn(stop.clone().run_until_cancelled_owned(accept(listener, shared.clone(), stop.clone())));
        Self { addr, shared, stop }
    }

    /// `database` by way of this proxy.
    #[must_use]
    pub fn url(&self, database: &Url) -> Url {
        let path = database.path();
        Url::parse(&format!("postgres://{}@{}{path}?sslmode=disable", database.username(), self.addr)).expect("a URL")
    }

    /// Changes the way; a change is felt by what is under way.
    pub fn set(&self, line: Line) {
        self.shared.line.send_replace(line);
    }

    /// Postgres is away: open connections are cut, new ones refused.
    pub fn go_away(&self) {
        self.set(Line { refuses: true, ..Line::default() });
        self.cut();
    }

    /// All is well again.
    pub fn come_back(&self) {
        self.set(Line::default());
    }

    /// Cuts all connections; new ones are let through.
    pub fn cut(&self) {
        self.cut_those(|_| true);
    }

    /// Cuts the connections on which somebody listens for notifications, and answers how many.
    pub fn cut_listeners(&self) -> usize {
        self.cut_those(|connection| connection.listens.load(Ordering::Relaxed))
    }

    fn cut_those(&self, which: impl Fn(&Connection) -> bool) -> usize {
        let mut connections = self.shared.connections.lock().unwrap_or_else(PoisonError::into_inner);
        connections.retain(|connection| !connection.cut.is_cancelled());
        connections.iter().filter(|connection| which(connection)).map(|connection| connection.cut.cancel()).count()
    }

    /// How many connections were asked for so far, refused ones included.
    #[must_use]
    pub fn knocks(&self) -> u64 {
        self.shared.knocks.load(Ordering::Relaxed)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>, stop: CancellationToken) {
    loop {
        let Ok((client, _)) = listener.accept().await else { return };
        shared.knocks.fetch_add(1, Ordering::Relaxed);
        if shared.line.borrow().refuses {
            continue;
        }
        let _ = client.set_nodelay(true);
        let connection = Arc::new(Connection { cut: stop.child_token(), listens: AtomicBool::new(false) });
        let mut connections = shared.connections.lock().unwrap_or_else(PoisonError::into_inner);
        connections.retain(|connection| !connection.cut.is_cancelled());
        connections.push(connection.clone());
        drop(connections);
        tokio::spawn(carry(client, shared.clone(), connection));
    }
}

async fn carry(client: TcpStream, shared: Arc<Shared>, connection: Arc<Connection>) {
    let carrying = async {
        let Ok(server) = UnixStream::connect(&shared.socket).await else { return };
        let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
        let (asking, answering) = (shared.line.subscribe(), shared.line.subscribe());
        tokio::select! {
            () = pump(from_client, to_server, asking, Some(&connection)) => {}
            () = pump(from_server, to_client, answering, None) => {}
        }
    };
    connection.cut.run_until_cancelled(carrying).await;
    connection.cut.cancel();
}

async fn pump(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    mut line: watch::Receiver<Line>,
    asks: Option<&Connection>,
) {
    let mut buffer = vec![0; CHUNK];
    loop {
        let Ok(read @ 1..) = from.read(&mut buffer).await else { return };
        let chunk = &buffer[..read];
        if let Some(connection) = asks.filter(|_| chunk.windows(7).any(|text| text == b"LISTEN ")) {
            connection.listens.store(true, Ordering::Relaxed);
        }
        if line.wait_for(|line| !line.stalls).await.is_err() {
            return;
        }
        let Line { latency, bytes_per_second, .. } = *line.borrow();
        let narrow = bytes_per_second.map_or(0.0, |bytes| read as f64 / f64::from(bytes.max(1)));
        let pause = latency + Duration::from_secs_f64(narrow);
        if !pause.is_zero() {
            tokio::time::sleep(pause).await;
        }
        if to.write_all(chunk).await.is_err() {
            return;
        }
    }
}
