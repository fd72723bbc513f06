/**
 * A self-signed certificate for 127.0.0.1 and its key, valid until 2125. For tests of TLS only: the key is public.
 *
 *     openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 36500 \
 *       -subj "/CN=relay test" -addext "subjectAltName=IP:127.0.0.1" -keyout key.pem -out cert.pem
 */
export const CERTIFICATE = `-----BEGIN CERTIFICATE-----
MIIBkjCCATigAwIBAgIUajtij6d1IwpmbalhEpJBN0SUCi4wCgYIKoZIzj0EAwIw
FTETMBEGA1UEAwwKcmVsYXkgdGVzdDAgFw0yNjExMjMwODQ3MzdaGA8yMTI2MTAz
MDA4NDczN1owFTETMBEGA1UEAwwKcmVsYXkgdGVzdDBZMBMGByqGSM49AgEGCCqG
SM49AwEHA0IABG6kMKXYqCjYwTICWl6I/ganK0WRYWiDC/JsAgDlqCi62BqP2Fj3
UDuJ3Z+pp3JCvp1IdFFOOuse9++NnS2FKGKjZDBiMB0GA1UdDgQWBBQDcP4CJh3W
H8r40Jk96ZYvSKhIQjAfBgNVHSMEGDAWgBQDcP4CJh3WH8r40Jk96ZYvSKhIQjAP
BgNVHRMBAf8EBTADAQH/MA8GA1UdEQQIMAaHBH8AAAEwCgYIKoZIzj0EAwIDSAAw
RQIgBWEXQRPhoaBErvn39YGmJM8u/QOqjXS2A/oBz5p3ShUCIQDu5hngw8seZObV
fEexeS/NMCK2EdhOshob1xsynWgZEQ==
-----END CERTIFICATE-----
`;

export const PRIVATE_KEY = `-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgqYYjlwya3yXGsGzc
HoHA7fwXD1i4yQ4gkFKhVALn7GyhRANCAARupDCl2Kgo2MEyAlpeiP4GpytFkWFo
gwvybAIA5agoutgaj9hY91A7id2fqadyQr6dSHRRTjrrHvfvjZ0thShi
-----END PRIVATE KEY-----
`;
