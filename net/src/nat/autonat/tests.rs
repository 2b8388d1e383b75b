use tokio::io::duplex;

use super::*;

const CLIENT: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(1, 1, 1, 1));

fn address(text: &str) -> Multiaddr {
    text.parse().unwrap()
}

async fn exchange(wanted: &str, reached: bool) -> (Result<bool, AutonatError>, Option<Wanted>) {
    let (near, mut far) = duplex(1 << 12);
    let wanted = address(wanted);
    let server = async {
        let mine = HashSet::from(["9.9.9.9".parse().unwrap()]);
        let wanted = receive(&mut far, CLIENT, &mine).await.unwrap();
        if let Some(wanted) = &wanted {
            respond(&mut far, wanted, reached, reached).await.unwrap();
        }
        wanted
    };
    tokio::join!(ask(near, &wanted, 7), server)
}

#[tokio::test]
async fn a_server_reports_the_result_of_its_dial() {
    for reached in [true, false] {
        let (result, wanted) = exchange("/ip4/1.1.1.1/tcp/5", reached).await;
        assert_eq!(result.unwrap(), reached);
        let wanted = wanted.unwrap();
        assert_eq!(wanted.nonce, 7);
        assert!(!wanted.needs_data);
    }
}

#[tokio::test]
async fn a_client_sends_data_before_an_address_it_is_not_seen_at_is_dialed() {
    let (result, wanted) = exchange("/ip4/2.2.2.2/tcp/5", true).await;
    assert!(result.unwrap());
    assert!(wanted.unwrap().needs_data);
    let (near, mut far) = duplex(1 << 12);
    let cheat = async {
        let (mut reader, mut writer) = tokio::io::split(near);
        let request = AutonatDialRequest {
            addrs: vec![address("/ip4/2.2.2.2/tcp/5").to_vec().into()],
            nonce: 7,
        };
        say(&mut writer, Msg::DialRequest(request)).await.unwrap();
        next(&mut reader).await.unwrap();
        let nothing = AutonatDataResponse { data: Bytes::new() };
        say(&mut writer, Msg::DataResponse(nothing)).await.unwrap();
    };
    let mine = HashSet::new();
    let ((), received) = tokio::join!(cheat, receive(&mut far, CLIENT, &mine));
    assert!(matches!(received, Err(AutonatError::Malformed)));
}

#[tokio::test]
async fn private_and_own_addresses_are_not_dialed() {
    for refused in [
        "/ip4/10.0.0.1/tcp/22",
        "/ip4/127.0.0.1/tcp/22",
        "/ip6/::1/tcp/22",
        "/ip4/9.9.9.9/tcp/22",
        "/dns4/a.example/tcp/22",
    ] {
        let (result, wanted) = exchange(refused, true).await;
        assert!(matches!(result, Err(AutonatError::Refused)), "{refused}");
        assert!(wanted.is_none());
    }
}

#[tokio::test]
async fn a_server_that_asks_for_too_much_data_gets_none() {
    let (near, mut far) = duplex(1 << 16);
    let server = async {
        next(&mut far).await.unwrap();
        let request = AutonatDataRequest {
            addr_idx: 0,
            num_bytes: u64::MAX,
        };
        say(&mut far, Msg::DataRequest(request)).await.unwrap();
    };
    let wanted = address("/ip4/1.1.1.1/tcp/5");
    let (result, ()) = tokio::join!(ask(near, &wanted, 7), server);
    assert!(matches!(result, Err(AutonatError::Malformed)));
}

#[tokio::test]
async fn the_dial_back_carries_the_nonce() {
    let (near, mut far) = duplex(1 << 12);
    let client = async {
        let nonce = answer(&mut far).await.unwrap();
        acknowledge(far).await.unwrap();
        nonce
    };
    let (called, nonce) = tokio::join!(call(near, 42), client);
    called.unwrap();
    assert_eq!(nonce, 42);
}

#[test]
fn serving_is_limited_in_total_and_per_peer_and_network() {
    let limits = AutonatLimits {
        per_minute: 4,
        per_minute_per_peer: 2,
        per_minute_per_network: 3,
        concurrent: 8,
    };
    let mut bounds = Bounds::new(limits);
    let now = Instant::now();
    let (one, two) = (PeerId::random(), PeerId::random());
    let near = ["5.5.5.1", "5.5.5.2"].map(|ip| ip.parse().unwrap());
    assert!(bounds.begin(one, near[0], now));
    assert!(bounds.begin(one, near[0], now));
    assert!(!bounds.begin(one, near[1], now), "one peer");
    assert!(bounds.begin(two, near[1], now));
    assert!(!bounds.begin(two, near[1], now), "one network");
    assert!(bounds.begin(two, "6.6.6.6".parse().unwrap(), now));
    assert!(
        !bounds.begin(PeerId::random(), "7.7.7.7".parse().unwrap(), now),
        "all"
    );
    for _ in 0..4 {
        bounds.ended();
    }
    assert!(bounds.begin(one, near[0], now + MINUTE));
    let mut bounds = Bounds::new(AutonatLimits {
        concurrent: 1,
        ..AutonatLimits::default()
    });
    assert!(bounds.begin(one, near[0], now));
    assert!(!bounds.begin(two, near[1], now), "at a time");
}

fn at(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

/// Each row breaks one condition.
#[test]
fn a_dial_back_counts_only_on_a_new_inbound_connection_at_the_asked_address() {
    let (begin, dialed) = (Instant::now(), Dialed::default());
    let later = begin + Duration::from_secs(1);
    let own = DialQuestion {
        at: at("1.1.1.1:9338"),
        transport: Transport::Tcp,
        own: true,
        open: true,
        since: later,
    };
    let good = Inbound {
        local: at("1.1.1.1:9338"),
        from: at("7.7.7.7:40000"),
        transport: Transport::Tcp,
        since: later,
    };
    let check = |question: &DialQuestion, connection: &Inbound| {
        question.answered_by(connection, &dialed, false, later)
    };
    assert_eq!(check(&own, &good), Some(Back::Proven));
    let change = |change: &dyn Fn(&mut Inbound)| {
        let mut connection = good.clone();
        change(&mut connection);
        connection
    };
    for bad in [
        change(&|c| c.since = begin),
        change(&|c| c.transport = Transport::Quic),
        change(&|c| c.transport = Transport::Ws),
        change(&|c| c.local = at("1.1.1.1:443")),
        change(&|c| c.local = at("192.168.1.7:9338")),
        change(&|c| c.from = at("192.168.1.1:40000")),
    ] {
        assert_eq!(check(&own, &bad), None, "{bad:?}");
    }
    // Behind a NAT, the dial-back arrives at a private address of this node.
    let nat = DialQuestion {
        own: false,
        open: false,
        at: at("9.9.9.9:7"),
        ..own.clone()
    };
    assert_eq!(check(&nat, &good), None);
    let through = change(&|c| c.local = at("192.168.1.7:9338"));
    assert_eq!(check(&nat, &through), Some(Back::Proven));
    // From an IP address to which this node has sent packets.
    dialed.note(at("7.7.7.7:443"), begin);
    assert_eq!(check(&nat, &through), Some(Back::Contact));
    assert_eq!(check(&own, &good), Some(Back::Open));
    let chosen = own.answered_by(&good, &dialed, true, later);
    assert_eq!(chosen, Some(Back::Proven));
    // From the port to which this node has sent packets: a firewall takes it for the answer.
    dialed.note(at("7.7.7.7:40000"), begin);
    assert_eq!(check(&own, &good), Some(Back::Contact));
}

#[test]
fn one_contact_alone_does_not_make_an_address_reached() {
    let (now, mine) = (Instant::now(), address("/ip4/1.1.1.1/tcp/5"));
    let ips = ["7.7.7.7", "7.7.7.8", "8.8.8.8"].map(|ip| ip.parse::<IpAddr>().unwrap());
    let begin = || {
        let mut verdicts = Verdicts::default();
        verdicts.due(std::slice::from_ref(&mine), now);
        verdicts
    };
    let mut verdicts = begin();
    verdicts.record(&mine, ips[0], Some((Back::Open, ips[0])), now);
    assert_eq!(verdicts.of(&mine), Some(Verdict::ByContacts));
    // The server's network is not asked again; another one is, at once.
    assert!(verdicts.tried(&mine).covers(&ips[1]) && !verdicts.tried(&mine).covers(&ips[2]));
    assert_eq!(verdicts.due(std::slice::from_ref(&mine), now).len(), 1);
    verdicts.record(&mine, ips[1], Some((Back::Open, ips[1])), now);
    assert_eq!(verdicts.of(&mine), Some(Verdict::ByContacts));
    verdicts.record(&mine, ips[2], Some((Back::Open, ips[2])), now);
    assert_eq!(verdicts.of(&mine), Some(Verdict::Reached));
    let mut verdicts = begin();
    for ip in ips {
        verdicts.record(&mine, ip, Some((Back::Contact, ip)), now);
    }
    assert_eq!(verdicts.of(&mine), Some(Verdict::ByContacts));
    let mut verdicts = begin();
    verdicts.record(&mine, ips[0], Some((Back::Proven, ips[0])), now);
    assert_eq!(verdicts.of(&mine), Some(Verdict::Reached));
}

#[test]
fn one_failure_does_not_make_an_address_unreachable() {
    let mut verdicts = Verdicts::default();
    let (now, mine) = (Instant::now(), address("/ip4/1.1.1.1/tcp/5"));
    let servers: [IpAddr; 2] = ["7.7.7.7", "8.8.8.8"].map(|ip| ip.parse().unwrap());
    let candidates = [mine.clone()];
    assert_eq!(verdicts.due(&candidates, now), candidates);
    verdicts.ask(&mine);
    assert!(verdicts.due(&candidates, now).is_empty());
    assert!(!verdicts.record(&mine, servers[0], None, now));
    assert_eq!(verdicts.of(&mine), None);
    assert!(verdicts.tried(&mine).covers(&servers[0]));
    assert!(!verdicts.tried(&mine).covers(&servers[1]));
    // At once, at another server.
    assert_eq!(verdicts.due(&candidates, now), candidates);
    assert!(verdicts.record(&mine, servers[1], None, now));
    assert_eq!(verdicts.of(&mine), Some(Verdict::Unreachable));
    assert!(verdicts.due(&candidates, now).is_empty());
    let later = now + RETRY.0;
    assert_eq!(verdicts.due(&candidates, later), candidates);
    assert!(verdicts.record(&mine, servers[0], Some((Back::Contact, servers[0])), later));
    assert_eq!(verdicts.of(&mine), Some(Verdict::ByContacts));
    assert!(verdicts.record(&mine, servers[0], Some((Back::Proven, servers[0])), later));
    assert!(!verdicts.record(&mine, servers[0], Some((Back::Contact, servers[0])), later));
    assert_eq!(verdicts.of(&mine), Some(Verdict::Reached));
    assert!(verdicts.due(&candidates, later).is_empty());
    assert_eq!(verdicts.due(&candidates, later + AGAIN), candidates);
    verdicts.ask_again(later);
    assert_eq!(verdicts.due(&candidates, later), candidates);
    // An address that is no longer a candidate is forgotten.
    assert!(verdicts.due(&[], later).is_empty());
    assert_eq!(verdicts.all().count(), 0);
}
